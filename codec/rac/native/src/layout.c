/* What Python checks before it calls: version, sizes and offsets, in the order of native/prototypes.py; and the
 * processor. */
#include "quantise.h"
#include "tile.h"

#define SIZE(type) (int64_t)sizeof(type)
#define AT(type, field) (int64_t)offsetof(type, field)
const int64_t rac_layout[] = {
    20,
    SIZE(rac_matrix), AT(rac_matrix, at), AT(rac_matrix, rows), AT(rac_matrix, cols), AT(rac_matrix, stride),
    SIZE(rac_dequant), AT(rac_dequant, rec), AT(rac_dequant, h0), AT(rac_dequant, h1), AT(rac_dequant, zero),
    AT(rac_dequant, even), AT(rac_dequant, size),
    SIZE(rac_shared), AT(rac_shared, luts), AT(rac_shared, values), AT(rac_shared, bases), AT(rac_shared, table),
    AT(rac_shared, row_classes), AT(rac_shared, col_classes), AT(rac_shared, skip), AT(rac_shared, lanes),
    AT(rac_shared, per), AT(rac_shared, word), AT(rac_shared, zero), AT(rac_shared, sign), AT(rac_shared, shift),
    AT(rac_shared, raw), AT(rac_shared, base), AT(rac_shared, first), AT(rac_shared, limit),
    SIZE(rac_job), AT(rac_job, unit), AT(rac_job, size), AT(rac_job, row_class), AT(rac_job, col_class),
    AT(rac_job, dst), AT(rac_job, rows), AT(rac_job, cols), AT(rac_job, stride), AT(rac_job, shared),
    AT(rac_job, numbers), AT(rac_job, row), AT(rac_job, col),
    SIZE(rac_search), AT(rac_search, states), AT(rac_search, h0), AT(rac_search, h1), AT(rac_search, low),
    AT(rac_search, levels), AT(rac_search, most), AT(rac_search, tables), AT(rac_search, lag), AT(rac_search, lane),
    AT(rac_search, rec), AT(rac_search, rate), AT(rac_search, fine), AT(rac_search, row), AT(rac_search, below),
    AT(rac_search, back), AT(rac_search, far), AT(rac_search, sparse),
    SIZE(rac_columns), AT(rac_columns, cols), AT(rac_columns, rows), AT(rac_columns, groups), AT(rac_columns, plain),
    AT(rac_columns, target), AT(rac_columns, feed), AT(rac_columns, step), AT(rac_columns, out), AT(rac_columns, recon),
    AT(rac_columns, wild), AT(rac_columns, fine_of),
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
