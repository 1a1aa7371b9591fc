# Every test of the repository. Labels say what a test needs: mpi, slow, sanitizer; or that it is about
# processes, which ThreadSanitizer has nothing to say about: the tsan preset leaves those out.
enable_testing()
include(GoogleTest)

# tp_test(<name> <library...> SOURCES <files...>): a GoogleTest executable, one CTest entry a test.
function(tp_test name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} GTest::gtest_main)
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 300)
endfunction()

file(GLOB base_tests CONFIGURE_DEPENDS harness/base/*_test.cc)
tp_test(base_test SOURCES ${base_tests} LIBRARIES tp_base)
target_compile_definitions(base_test PRIVATE TP_SOURCE_DIR="${CMAKE_SOURCE_DIR}")

# Files of the Python package safetensors, and ours for it. Skipped where the package cannot be had.
add_executable(safetensors_reference harness/base/safetensors_testing.cc)
target_link_libraries(safetensors_reference PRIVATE tp_base)
find_program(PYTHON3 python3)
if(PYTHON3)
  add_test(NAME safetensors_reference COMMAND ${PYTHON3} ${CMAKE_SOURCE_DIR}/harness/base/safetensors_testing.py
    ${CMAKE_BINARY_DIR}/safetensors $<TARGET_FILE:safetensors_reference>)
else()
  add_test(NAME safetensors_reference COMMAND sh -c "echo 'skipped: there is no python3'; exit 77")
endif()
# tpcheck on checkpoints that the package wrote.
if(PYTHON3)
  add_test(NAME checkpoint_reference COMMAND ${PYTHON3} ${CMAKE_SOURCE_DIR}/properties/checkpoint_testing.py
    ${CMAKE_BINARY_DIR}/safetensors $<TARGET_FILE:tpcheck>)
else()
  add_test(NAME checkpoint_reference COMMAND sh -c "echo 'skipped: there is no python3'; exit 77")
endif()
set_tests_properties(checkpoint_reference PROPERTIES LABELS "mpi;processes" ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0")
set_tests_properties(safetensors_reference checkpoint_reference PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77
  RESOURCE_LOCK safetensors_venv)

# Adapters as Python and the package peft read them; the latter where Python has torch.
add_executable(peft_reference harness/base/peft_testing.cc)
target_link_libraries(peft_reference PRIVATE tp_base)
if(PYTHON3)
  set(adapter_testing ${PYTHON3} ${CMAKE_SOURCE_DIR}/properties/adapter_testing.py)
  add_test(NAME adapter_patterns COMMAND ${adapter_testing} patterns $<TARGET_FILE:peft_reference>)
  add_test(NAME adapter_reference COMMAND ${adapter_testing} peft ${CMAKE_BINARY_DIR} $<TARGET_FILE:peft_reference>)
else()
  foreach(name adapter_patterns adapter_reference)
    add_test(NAME ${name} COMMAND sh -c "echo 'skipped: there is no python3'; exit 77")
  endforeach()
endif()
set_tests_properties(adapter_patterns adapter_reference PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77)

file(GLOB device_tests CONFIGURE_DEPENDS harness/device/*_test.cc)
if(TP_BACKEND STREQUAL cuda)
  # The others are about the emulator; a kernel that is never signalled would hang a real GPU.
  set(device_tests harness/device/kernels_test.cc harness/device/buffer_test.cc harness/device/matmul_test.cc
                   harness/device/scaled_matmul_test.cc harness/device/streamed_product_test.cc)
endif()
tp_test(device_test SOURCES ${device_tests} harness/device/kernels_testing.cu LIBRARIES tp_device GTest::gmock)

# Mistakes planted into kernels, and what each build must say of them.
add_executable(planted_bugs harness/device/planted_bugs_testing.cu)
target_link_libraries(planted_bugs PRIVATE tp_device)
if(TP_BACKEND STREQUAL emulator)  # on a GPU it is compute-sanitizer that must find them: .ci/gpu
  set(expect_none "")  # empty: exit code 0
  set(expect_missing_barrier WrongValue)
  set(expect_missing_wait WrongValue)
  set(expect_early_copy WrongValue)
  set(expect_shared_overrun OutOfBounds)
  set(expect_buffer_overrun OutOfBounds)
  set(expect_block_race "")
  set(expect_missing_fence "")
  if(TP_SANITIZE STREQUAL thread)
    foreach(mode missing_barrier missing_wait early_copy block_race missing_fence)
      set(expect_${mode} "data race")
    endforeach()
  elseif(TP_SANITIZE STREQUAL address)
    set(expect_shared_overrun heap-buffer-overflow)
    set(expect_buffer_overrun use-after-poison)
  endif()
  foreach(mode none missing_barrier missing_wait early_copy shared_overrun buffer_overrun block_race missing_fence)
    add_test(NAME planted_bugs.${mode} COMMAND planted_bugs ${mode})
    if(expect_${mode})
      set_tests_properties(planted_bugs.${mode} PROPERTIES PASS_REGULAR_EXPRESSION ${expect_${mode}})
    endif()
  endforeach()
endif()

# tp_mpi_test(<name> ...): the same executable as `mpirun -n 1|2|4`, one CTest entry each. P = 1 runs without
# mpirun: a world of one never touches MPI.
function(tp_mpi_test name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(${name} ${arg_SOURCES} harness/group/mpi_testing.cc)
  target_link_libraries(${name} PRIVATE ${arg_LIBRARIES} GTest::gtest)
  foreach(processes 1 2 4)
    if(processes EQUAL 1)
      add_test(NAME ${name}.n1 COMMAND ${name})
    else()
      add_test(NAME ${name}.n${processes}
        COMMAND ${MPIEXEC_EXECUTABLE} --bind-to none ${MPIEXEC_NUMPROC_FLAG} ${processes} $<TARGET_FILE:${name}>)
    endif()
    set_tests_properties(${name}.n${processes} PROPERTIES TIMEOUT 300 LABELS mpi PROCESSORS 2 ENVIRONMENT
      "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_mpi_yield_when_idle=1;ASAN_OPTIONS=detect_leaks=0")
  endforeach()
endfunction()

tp_mpi_test(group_test SOURCES harness/group/tp_group_test.cc harness/group/peers_test.cc harness/group/peers_testing.cu
  LIBRARIES tp_group)
tp_test(budget_test LIBRARIES tp_base
  SOURCES properties/rms_norm_budget_test.cc properties/rope_budget_test.cc
          properties/product_budget_test.cc properties/quantise_budget_test.cc properties/merged_linear_budget_test.cc
          properties/lora_budget_test.cc
          properties/attention_budget_test.cc
          properties/attention_data.cc)
tp_mpi_test(oracles_test SOURCES properties/run/oracles_test.cc properties/run/faulty_testing.cu LIBRARIES tp_run)
tp_mpi_test(properties_test LIBRARIES tp_properties tp_fuzz
  SOURCES properties/properties_test.cc properties/norm_mutants_test.cc properties/attention_mutants_test.cc
          properties/attention_choice_test.cc
          properties/merged_linear_test.cc properties/stored_linear_test.cc properties/blocks_test.cc
          properties/stages_test.cc properties/lora_operator_test.cc properties/lora_user_test.cc
          properties/variants_test.cc)
target_compile_definitions(properties_test PRIVATE TP_BLOCKS="${CMAKE_SOURCE_DIR}/properties/blocks.cases"
  TP_CORPUS="${CMAKE_SOURCE_DIR}/harness/base/corpus")

tp_test(attention_test SOURCES properties/attention_test.cc kernels/attention_testing.cu LIBRARIES tp_kernels)
tp_test(quantise_test SOURCES properties/quantise_test.cc LIBRARIES tp_kernels)
tp_test(weight_loader_test SOURCES kernels/weight_loader_test.cc LIBRARIES tp_kernels)
tp_test(lora_test SOURCES kernels/lora_test.cc LIBRARIES tp_kernels)
tp_test(lora_slots_test SOURCES kernels/lora_slots_test.cc LIBRARIES tp_kernels)
tp_test(share_test SOURCES properties/run/share_test.cc LIBRARIES tp_run)
tp_test(file_linears_test SOURCES properties/file_linears_test.cc LIBRARIES tp_properties)
tp_test(sample_test SOURCES properties/sample_test.cc LIBRARIES tp_properties)
target_compile_definitions(sample_test PRIVATE TP_SAMPLE="${CMAKE_SOURCE_DIR}/properties/sample.cases")
add_test(NAME sample_passes COMMAND tpcheck replay ${CMAKE_SOURCE_DIR}/properties/sample.cases -n 1)
set_tests_properties(sample_passes PROPERTIES TIMEOUT 300 LABELS processes)

tp_mpi_test(kernel_bench_test LIBRARIES tp_properties benchmark::benchmark
  SOURCES benches/kernel_bench_test.cc benches/kernel_bench.cc benches/bench_data.cc)
if(TP_BACKEND STREQUAL emulator)
  # Every kernel that is timed on a GPU, once.
  add_test(NAME kernel_benches COMMAND tpcheck bench --benchmark_filter=/cache:)
  set_tests_properties(kernel_benches PROPERTIES TIMEOUT 300)
endif()
if(PYTHON3)
  add_test(NAME peers_table COMMAND ${CMAKE_SOURCE_DIR}/benches/peers/peers_test.sh)
endif()

file(GLOB cli_tests CONFIGURE_DEPENDS harness/cli/*_test.cc)
tp_test(cli_unit_test SOURCES ${cli_tests} LIBRARIES tp_cli)
add_test(NAME cli_test COMMAND ${CMAKE_SOURCE_DIR}/harness/cli/cli_test.sh $<TARGET_FILE:tpcheck>)
set_tests_properties(cli_test PROPERTIES TIMEOUT 120 LABELS "mpi;processes" ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0")

# The fuzzer, on an operator that fails on purpose (canary_testing.h).
set(fuzz harness/fuzz)
tp_test(fuzz_test LIBRARIES tp_fuzz
  SOURCES ${fuzz}/domain_test.cc ${fuzz}/draw_test.cc ${fuzz}/shrink_test.cc ${fuzz}/protocol_test.cc
          ${fuzz}/summary_test.cc ${fuzz}/where_test.cc ${fuzz}/fatal_signals_test.cc ${fuzz}/canary_testing.cc)
if(TP_BACKEND STREQUAL emulator)  # about processes, of which a machine may have more than GPUs
  add_executable(supervisor_test ${fuzz}/supervisor_test.cc ${fuzz}/canary_testing.cc)
  target_link_libraries(supervisor_test PRIVATE tp_fuzz GTest::gtest)  # it is its own worker: main is in it
  add_test(NAME supervisor_test COMMAND supervisor_test)
  add_executable(tpcheck_canary ${fuzz}/canary_main_testing.cc ${fuzz}/canary_testing.cc)
  target_link_libraries(tpcheck_canary PRIVATE tp_cli)
  add_executable(commands_test ${fuzz}/commands_test.cc)
  target_link_libraries(commands_test PRIVATE tp_flags GTest::gtest_main)
  target_compile_definitions(commands_test PRIVATE TPCHECK_CANARY="$<TARGET_FILE:tpcheck_canary>")
  add_dependencies(commands_test tpcheck_canary)
  # Two executors on a machine with one: a second canary says that it is a GPU's.
  add_executable(tpcheck_canary_gpu ${fuzz}/canary_main_testing.cc ${fuzz}/canary_testing.cc ${fuzz}/place_testing.cc)
  target_link_libraries(tpcheck_canary_gpu PRIVATE tp_cli)
  target_sources(commands_test PRIVATE ${fuzz}/executors_test.cc)
  target_compile_definitions(commands_test PRIVATE TPCHECK_CANARY_GPU="$<TARGET_FILE:tpcheck_canary_gpu>")
  add_dependencies(commands_test tpcheck_canary_gpu)
  add_test(NAME commands_test COMMAND commands_test)
  set(process_tests supervisor_test commands_test)
endif()
add_executable(hangs_test properties/run/hangs_test.cc properties/run/hangs_testing.cc
  properties/run/hangs_testing.cu)
target_link_libraries(hangs_test PRIVATE tp_run tp_fuzz GTest::gtest)  # its own worker, too
add_test(NAME hangs_test COMMAND hangs_test)
# They watch processes, folders and deadlines: nothing may run beside them.
set_tests_properties(${process_tests} hangs_test PROPERTIES TIMEOUT 300 RUN_SERIAL ON LABELS "mpi;processes" ENVIRONMENT
  # A crash on purpose shall be a crash under the sanitizers, too.
  "ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_abort=0;TSAN_OPTIONS=handle_segv=0:handle_abort=0")

if(TP_BACKEND STREQUAL emulator AND TP_SANITIZE STREQUAL none)
  include(fuzzers.cmake)
endif()
