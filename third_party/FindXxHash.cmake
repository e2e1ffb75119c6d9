# xxHash, used header-only (Debian: libxxhash-dev). Target: XxHash::XxHash
find_path(XxHash_INCLUDE_DIR xxhash.h)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(XxHash REQUIRED_VARS XxHash_INCLUDE_DIR)
if(XxHash_FOUND AND NOT TARGET XxHash::XxHash)
  add_library(XxHash::XxHash INTERFACE IMPORTED)
  set_target_properties(XxHash::XxHash PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES ${XxHash_INCLUDE_DIR}
    # KV comes from memory, not from a cache: xxHash's own 384 bytes ahead are too few there. With
    # 4 KiB it runs at the rate at which one thread can read, or at that of its instructions.
    INTERFACE_COMPILE_DEFINITIONS "XXH_INLINE_ALL;XXH_PREFETCH_DIST=4096")
endif()
