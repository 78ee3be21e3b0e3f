/* What Python checks before it calls: version, sizes and offsets, in the order of native/prototypes.py; and the
 * processor. */
#include "coded.h"
#include "encode.h"
#include "quantise.h"
#include "records.h"

#undef AT
#define SIZE(type) (int64_t)sizeof(type)
#define AT(type, field) (int64_t)offsetof(type, field)
const int64_t rac_layout[] = {
    31,
    SIZE(rac_matrix), AT(rac_matrix, at), AT(rac_matrix, rows), AT(rac_matrix, cols), AT(rac_matrix, stride),
    SIZE(rac_dequant), AT(rac_dequant, rec), AT(rac_dequant, h0), AT(rac_dequant, h1), AT(rac_dequant, zero),
    AT(rac_dequant, size),
    SIZE(rac_shared), AT(rac_shared, luts), AT(rac_shared, values), AT(rac_shared, bases), AT(rac_shared, table),
    AT(rac_shared, row_classes), AT(rac_shared, col_classes), AT(rac_shared, skip), AT(rac_shared, lanes),
    AT(rac_shared, per), AT(rac_shared, word), AT(rac_shared, zero), AT(rac_shared, sign), AT(rac_shared, shift),
    AT(rac_shared, raw), AT(rac_shared, base), AT(rac_shared, first), AT(rac_shared, limit),
    SIZE(rac_job), AT(rac_job, unit), AT(rac_job, size), AT(rac_job, row_class), AT(rac_job, col_class),
    AT(rac_job, dst), AT(rac_job, rows), AT(rac_job, cols), AT(rac_job, stride), AT(rac_job, shared),
    AT(rac_job, numbers), AT(rac_job, row), AT(rac_job, col),
    SIZE(rac_span), AT(rac_span, all), AT(rac_span, units), AT(rac_span, first), AT(rac_span, tiles),
    AT(rac_span, tall), AT(rac_span, wide), AT(rac_span, word),
    SIZE(rac_search), AT(rac_search, states), AT(rac_search, h0), AT(rac_search, h1), AT(rac_search, low),
    AT(rac_search, levels), AT(rac_search, most), AT(rac_search, tables), AT(rac_search, lag), AT(rac_search, lane),
    AT(rac_search, rec), AT(rac_search, rate), AT(rac_search, fine), AT(rac_search, row), AT(rac_search, below),
    AT(rac_search, back), AT(rac_search, far), AT(rac_search, sparse),
    SIZE(rac_columns), AT(rac_columns, cols), AT(rac_columns, rows), AT(rac_columns, groups), AT(rac_columns, plain),
    AT(rac_columns, target), AT(rac_columns, feed), AT(rac_columns, step), AT(rac_columns, out), AT(rac_columns, recon),
    AT(rac_columns, wild), AT(rac_columns, fine_of),
    SIZE(rac_coding), AT(rac_coding, lut), AT(rac_coding, model), AT(rac_coding, escaping), AT(rac_coding, table),
    AT(rac_coding, bases), AT(rac_coding, row_classes), AT(rac_coding, col_classes), AT(rac_coding, tables),
    AT(rac_coding, lanes), AT(rac_coding, per), AT(rac_coding, word), AT(rac_coding, zero), AT(rac_coding, sign),
    AT(rac_coding, shift), AT(rac_coding, first), AT(rac_coding, skip),
    SIZE(rac_piece), AT(rac_piece, words), AT(rac_piece, row_class), AT(rac_piece, col_class), AT(rac_piece, rows),
    AT(rac_piece, cols), AT(rac_piece, stride),
    SIZE(rac_record), AT(rac_record, stated), AT(rac_record, stated_size), AT(rac_record, at), AT(rac_record, head),
    AT(rac_record, payload), AT(rac_record, check), AT(rac_record, out), AT(rac_record, size), AT(rac_record, word),
    AT(rac_record, coder),
    SIZE(rac_coded), AT(rac_coded, codes), AT(rac_coded, rows), AT(rac_coded, columns), AT(rac_coded, places),
    AT(rac_coded, values), AT(rac_coded, out), AT(rac_coded, in), AT(rac_coded, apart), AT(rac_coded, kind),
    SIZE(rac_team), AT(rac_team, open), AT(rac_team, apart1), AT(rac_team, left), AT(rac_team, apart2),
    AT(rac_team, task), AT(rac_team, parallel), AT(rac_team, threads), AT(rac_team, busy),
    -1,
};

/* The instruction sets that this processor and its system have, as bits in the order of CPUS (native/library.py): 1 generic,
 * 2 AVX2, 4 AVX-512, 8 NEON, with what setup.py compiles for. Only the generic library is asked. By hand:
 * __builtin_cpu_supports needs a run time library that not every compiler brings. */
#if defined(__x86_64__)
#include <cpuid.h>

/* The parts of its state that the system keeps for a process: 6 of AVX, 0xe0 of AVX-512 */
static uint64_t kept(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

#ifdef __APPLE__
#include <sys/sysctl.h>
/* macOS keeps the state of AVX-512 from the first use on, and says by name whether it would */
static int keeps_wide(void) {
    int is = 0;
    size_t size = sizeof is;
    return sysctlbyname("hw.optional.avx512vl", &is, &size, NULL, 0) == 0 && is;
}
#else
static int keeps_wide(void) { return (kept() & 0xe0) == 0xe0; }
#endif

int rac_cpu(void) {
    const uint32_t xsave = 1u << 27, avx = 1u << 28, popcnt = 1u << 23; /* of leaf 1, ecx */
    const uint32_t avx2 = 1u << 5, bmi2 = 1u << 8;                      /* of leaf 7, ebx, as are: */
    const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || ~c & (xsave | avx | popcnt) || (kept() & 6) != 6) return 1;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~b & (avx2 | bmi2)) return 1;
    return ~b & (f | dq | bw | vl) || !keeps_wide() ? 3 : 7;
}
#elif defined(__aarch64__)
int rac_cpu(void) { return 1 | 8; } /* every one has NEON */
#else
int rac_cpu(void) { return 1; }
#endif
