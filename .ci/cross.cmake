# CMake toolchain file: cross-compiles with Debian's GCC for the target named in the environment, such as
#   FASTBERT_TARGET=aarch64-linux-gnu cmake -S . -B build --toolchain .ci/cross.cmake
# (packages gcc-aarch64-linux-gnu, gcc-arm-linux-gnueabihf, gcc-riscv64-linux-gnu)
set(target "$ENV{FASTBERT_TARGET}")
if(target STREQUAL "")
  message(FATAL_ERROR "FASTBERT_TARGET: expected a target such as aarch64-linux-gnu in the environment")
endif()
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${target}")
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_C_COMPILER ${target}-gcc)
set(CMAKE_FIND_ROOT_PATH /usr/${target})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
