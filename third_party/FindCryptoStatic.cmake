# OpenSSL's libcrypto, static, for SHA-256 and AES-GCM (Debian: libssl-dev).
# Target: CryptoStatic::CryptoStatic
find_path(CryptoStatic_INCLUDE_DIR openssl/sha.h)
find_library(CryptoStatic_LIBRARY NAMES libcrypto.a)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CryptoStatic
  REQUIRED_VARS CryptoStatic_LIBRARY CryptoStatic_INCLUDE_DIR)
if(CryptoStatic_FOUND AND NOT TARGET CryptoStatic::CryptoStatic)
  add_library(CryptoStatic::CryptoStatic UNKNOWN IMPORTED)
  set_target_properties(CryptoStatic::CryptoStatic PROPERTIES
    IMPORTED_LOCATION ${CryptoStatic_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${CryptoStatic_INCLUDE_DIR}
    INTERFACE_LINK_LIBRARIES "${CMAKE_DL_LIBS}")
endif()
