# Planted bugs, each of which the named test must report: a test that cannot fail proves nothing.
# Only the mutated file is copied and only what it is compiled into is built anew; of the test its
# objects are taken, of everything else the libraries that it links.

# ca_mutant(NAME FOLDER SOURCE FILE TEST ARGS OLD NEW): replaces OLD, which stands once in FILE, by
# NEW, builds SOURCE with it, and expects the program TEST, run with ARGS, to report a failure.
# SOURCE and FILE lie in FOLDER. Sets `mutant` to the program where it is built.
function(ca_mutant name folder source file test args old new)
  set(overlay ${CMAKE_CURRENT_BINARY_DIR}/mutants/${name})
  set_property(DIRECTORY APPEND PROPERTY
    CMAKE_CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${folder}/${file})
  file(READ ${CMAKE_SOURCE_DIR}/${folder}/${file} text)
  string(REPLACE "${old}" "" without "${text}")
  string(LENGTH "${text}" length)
  string(LENGTH "${without}" left)
  string(LENGTH "${old}" once)
  math(EXPR removed "${length} - ${left}")
  set(mutant PARENT_SCOPE)
  if(NOT removed EQUAL once)
    # A failing test, so that the build goes on where somebody changes the file.
    add_test(NAME mutant_${name} COMMAND ${CMAKE_COMMAND} -E echo
      "The text to replace does not stand once in ${file}: ${old}")
    set_tests_properties(mutant_${name} PROPERTIES PASS_REGULAR_EXPRESSION "FAILED TEST")
    return()
  endif()
  string(REPLACE "${old}" "${new}" text "${text}")
  file(CONFIGURE OUTPUT ${overlay}/${folder}/${file} CONTENT "${text}" @ONLY)
  set(base ${CMAKE_SOURCE_DIR})
  if(source STREQUAL file)
    set(base ${overlay})
  endif()
  # Its functions are found before those of the libraries.
  add_executable(mutant_${name} ${base}/${folder}/${source} $<TARGET_OBJECTS:${test}>)
  target_include_directories(mutant_${name} BEFORE PRIVATE ${overlay})
  target_compile_options(mutant_${name} PRIVATE -O1 -fno-strict-aliasing -Wno-error)
  add_test(NAME mutant_${name} COMMAND mutant_${name} ${args})
  set_tests_properties(mutant_${name} PROPERTIES
    PASS_REGULAR_EXPRESSION "FAILED TEST|check failed|repeat it: " TIMEOUT 100)
  set(mutant mutant_${name} PARENT_SCOPE)
endfunction()
