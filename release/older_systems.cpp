// What GCC's headers use of a newer glibc or libstdc++ than the oldest that a wheel is for: each library has its own copy
// (release/symbols.map).
#include <new>
#include <sstream>

extern "C" {
// glibc 2.32. False: reference counts are always atomic.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace std {
// libstdc++ of GCC 11.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// Their default constructors and `str` are of GCC 9 and 11.
template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;
}  // namespace std
