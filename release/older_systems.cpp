// What GCC's headers use of a newer glibc or libstdc++ than the oldest that a wheel is for; hidden, one copy in each library.
#include <new>

extern "C" {
// glibc 2.32. False: reference counts are always atomic.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace std {
// libstdc++ of GCC 11.
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
