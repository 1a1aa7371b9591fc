# libFuzzer on the parsers of what users hand us, where clang and its runtime are installed: 15 seconds each from
# a seed corpus in the sources; what they learn stays in the build tree. Not a preset of its own: only the sources
# of base are compiled once more, by clang with sanitizers, and linked before the libraries that this tree has
# anyway. (An operator's keys come from properties, whose own code runs uninstrumented here; the asan preset
# has that.)

find_program(FUZZ_CXX NAMES clang++ clang++-20 clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14)
set(fuzz_why "there is no clang++")
if(FUZZ_CXX AND NOT FUZZ_CXX_WORKS)  # what is missing may be installed meanwhile
  file(WRITE ${CMAKE_BINARY_DIR}/fuzzers/try.cc
    "#include <cstddef>\nextern \"C\" int LLVMFuzzerTestOneInput(const unsigned char*, std::size_t) { return 0; }\n")
  execute_process(COMMAND ${FUZZ_CXX} -fsanitize=fuzzer,address,undefined try.cc -o try
    WORKING_DIRECTORY ${CMAKE_BINARY_DIR}/fuzzers RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  if(failed EQUAL 0)
    set(works TRUE)
  else()
    set(works FALSE)
  endif()
  set(FUZZ_CXX_WORKS ${works} CACHE INTERNAL "whether ${FUZZ_CXX} can link a libFuzzer target")
endif()
if(FUZZ_CXX AND NOT FUZZ_CXX_WORKS)
  set(fuzz_why "${FUZZ_CXX} has no libFuzzer or no sanitizers (Debian: libclang-rt-dev)")
endif()

# tp_fuzzer(<name> <source> CORPUS <folder> [DICT <file>] [LIBRARIES <what to link beside base>...])
function(tp_fuzzer name source)
  cmake_parse_arguments(arg "" "CORPUS;DICT" "LIBRARIES" ${ARGN})
  if(NOT FUZZ_CXX_WORKS)
    add_test(NAME ${name} COMMAND sh -c "echo 'skipped: ${fuzz_why}'; exit 77")
    set_tests_properties(${name} PROPERTIES SKIP_RETURN_CODE 77 LABELS fuzzer)
    return()
  endif()
  fuzz_object(object ${source})
  set(binary ${CMAKE_BINARY_DIR}/${name})
  add_custom_command(OUTPUT ${binary} DEPENDS ${object} ${fuzz_base} ${arg_LIBRARIES}
    COMMAND ${FUZZ_CXX} -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -o ${binary}
            ${object} ${fuzz_base} ${arg_LIBRARIES} $<TARGET_FILE:fmt::fmt>
    COMMAND_EXPAND_LISTS VERBATIM COMMENT "Linking ${name}")
  add_custom_target(${name}_target ALL DEPENDS ${binary})
  set(learned ${CMAKE_BINARY_DIR}/fuzzers/${name})
  file(MAKE_DIRECTORY ${learned})
  set(dict "")
  if(arg_DICT)
    set(dict -dict=${CMAKE_SOURCE_DIR}/${arg_DICT})
  endif()
  # The first folder takes what is new. An input of some kilobytes has no business with 64 MiB.
  add_test(NAME ${name} COMMAND ${binary} -max_total_time=15 -rss_limit_mb=512 -malloc_limit_mb=64 -timeout=5
    -max_len=4096 -print_final_stats=1 -artifact_prefix=${learned}- ${dict} ${learned} ${CMAKE_SOURCE_DIR}/${arg_CORPUS})
  set_tests_properties(${name} PROPERTIES TIMEOUT 120 LABELS fuzzer
    # What was freed is kept for a while; not for longer than the limit of memory allows.
    ENVIRONMENT "ASAN_OPTIONS=quarantine_size_mb=64")
endfunction()

# One source compiled with sanitizers and coverage; sets `variable` to its object file.
function(fuzz_object variable source)
  cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${CMAKE_SOURCE_DIR} OUTPUT_VARIABLE path)
  cmake_path(GET source FILENAME file)
  set(object ${CMAKE_BINARY_DIR}/fuzzers/${file}.o)
  add_custom_command(OUTPUT ${object} DEPENDS ${path} DEPFILE ${object}.d
    COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${FUZZ_CXX} -std=c++20 -O1 -g -fno-omit-frame-pointer
            -ffp-contract=off -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined
            -DFMT_SHARED -DTP_VERSION="${PROJECT_VERSION}" -I${CMAKE_SOURCE_DIR} -I${RANDOM123}
            -MD -MF ${object}.d -MT ${object} -c ${path} -o ${object}
    VERBATIM COMMENT "Building ${file} for fuzzers")
  set(${variable} ${object} PARENT_SCOPE)
endfunction()

set(fuzz_base "")
if(FUZZ_CXX_WORKS)
  file(GLOB sources CONFIGURE_DEPENDS harness/base/*.cc)
  list(FILTER sources EXCLUDE REGEX "_(test|testing)\\.cc$")
  foreach(source IN LISTS sources ITEMS ${models_cc})
    fuzz_object(object ${source})
    list(APPEND fuzz_base ${object})
  endforeach()
endif()

set(corpus harness/base/corpus)
tp_fuzzer(fuzz_safetensors harness/base/fuzz_safetensors_testing.cc CORPUS ${corpus}/safetensors
  DICT ${corpus}/safetensors.dict)
tp_fuzzer(fuzz_index harness/base/fuzz_index_testing.cc CORPUS ${corpus}/index)
tp_fuzzer(fuzz_config harness/base/fuzz_config_testing.cc CORPUS ${corpus}/config DICT ${corpus}/config.dict)
tp_fuzzer(fuzz_adapter_config harness/base/fuzz_adapter_config_testing.cc CORPUS ${corpus}/adapter_config
  DICT ${corpus}/adapter_config.dict)
set(keys_of_operators "")
foreach(library tp_properties tp_run tp_kernels tp_group tp_device Boost::context)
  list(APPEND keys_of_operators $<TARGET_FILE:${library}>)
endforeach()
tp_fuzzer(fuzz_case_line properties/fuzz_case_line_testing.cc CORPUS properties/corpus/case_line
  DICT properties/corpus/case_line.dict
  LIBRARIES ${keys_of_operators} ${MPI_CXX_LIBRARIES} ${XXHASH})
