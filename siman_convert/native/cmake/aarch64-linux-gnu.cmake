# 64-bit ARM from another machine, with Debian's cross compiler (package g++-aarch64-linux-gnu). What is built runs under
# qemu-user (package qemu-user-static) as a Cortex-A72, an ARMv8.0: an instruction of a later one would stop it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -cpu cortex-a72 -L /usr/aarch64-linux-gnu)
