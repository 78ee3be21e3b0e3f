/* What Python checks before it calls: version and sizes, in the order of native/prototypes.py; and the processor. */
#include "quantise.h"
#include "tile.h"

const int64_t rac_layout[] = {
    19,
    sizeof(rac_matrix),
    sizeof(rac_dequant),
    sizeof(rac_shared),
    sizeof(rac_job),
    sizeof(rac_search),
    sizeof(rac_columns),
    -1,
};

/* The best instruction set of this processor: 0 generic, 1 AVX2, 2 AVX-512, with what setup.py compiles for (CPUS).
 * Only the generic library is asked. */
int rac_cpu(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#define HAS(name) __builtin_cpu_supports(name)
    if (!HAS("avx2") || !HAS("bmi2") || !HAS("popcnt")) return 0;
    return HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") ? 2 : 1;
#else
    return 0;
#endif
}
