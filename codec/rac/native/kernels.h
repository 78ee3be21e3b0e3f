/* What the kernels share. Plain C, no Python headers; loaded through ctypes (which releases the GIL).
 * Every loop has a numpy or numba twin in the package that the tests hold it to, bit for bit. */
#ifndef RAC_KERNELS_H
#define RAC_KERNELS_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86 1
#endif

/* A function with this is compiled for three levels of the CPU, and the right one is taken at load */
#if defined(HAVE_X86) && defined(__linux__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif

enum { CHUNK = 1024 }; /* words that are joined or split at once */

#ifdef HAVE_X86
/* Whether the AVX-512 that all CPUs with AVX-512 but the first have is there */
static inline int has512(void) {
    static int known = -1;
    if (known < 0) {
        __builtin_cpu_init();
        known = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl");
    }
    return known;
}
#else
static inline int has512(void) { return 0; }
#endif
#endif
