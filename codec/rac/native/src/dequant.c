/* Words of a trellis to numbers (stages/trellis.md), and numbers to words (stages/lowrank.md). Twins:
 * rac/stages/trellis.py and words.py, bit for bit: plain float32 arithmetic in a fixed order, no contraction to fused
 * operations (setup.py). */
#include "rac.h"

enum { STRIP = 16, PLAIN = 32 }; /* rows of all columns, then the next: whole columns touch as many pages as rows */

/* Rows from..to of the n columns at `at`, in states s, whatever the magnitudes are */
INLINED void plain(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                   const rac_matrix *dst, int64_t at, int n, int64_t from, int64_t to, uint16_t *s) {
    for (int64_t i = from; i < to; i++) {
        const uint8_t *u = (const uint8_t *)words->at + i * words->stride + at;
        uint32_t bits[PLAIN] = {0};
        float v[PLAIN];
        for (int k = 0; k < n; k++) memcpy(bits + k, q->rec + u[k], 4);
        for (int k = 0; k < n; k++) bits[k] ^= (uint32_t)s[k] << 31;
        memcpy(v, bits, sizeof v);
        for (int k = 0; k < n; k++) v[k] = v[k] * col[at + k] * row[i];
        if (q->size == 4) memcpy((float *)dst->at + i * dst->stride + at, v, 4 * (size_t)n);
        else
            for (int k = 0; k < n; k++) ((uint16_t *)dst->at)[i * dst->stride + at + k] = bf16_of(v[k]);
        for (int k = 0; k < n; k++) {
            const int odd = s[k] & 1, next = (u[k] ^ q->zero) & 1;
            s[k] = (uint16_t)((s[k] >> 1) ^ (-odd & q->h0) ^ (-next & q->h1));
        }
    }
}

/* A tile of words to numbers: sign rec[word] col[j] row[i], the state of each column beginning at 0 */
static void untrellis_any(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                      const rac_matrix *dst, uint16_t *states) {
    const int64_t h = words->rows, w = words->cols;
    memset(states, 0, 2 * (size_t)w);
    for (int64_t top = 0; top < h; top += STRIP) {
        const int64_t end = least(h, top + STRIP);
        int64_t j = 0;
        for (; j + PLAIN <= w; j += PLAIN) plain(words, q, col, row, dst, j, PLAIN, top, end, states + j);
        if (j < w) plain(words, q, col, row, dst, j, (int)(w - j), top, end, states + j);
    }
}

#if defined(AVX512) || defined(AVX2) || defined(NEON)
/* The same, WIDE columns side by side, a byte of each in a register: its word, and its state with the bits reversed, so
 * that it moves left and its sign is where a float has it. A state of more than 8 bits has a second byte in front, where
 * the bits end that leave the other. Words of a range of 64 are looked up, byte by byte, among the
 * upper three bytes of floats: magnitudes are 64ths of at most 16 bits, so that the fourth is 0. */
#if defined(AVX512)
enum { WIDE = 64 };
#elif defined(AVX2)
enum { WIDE = 32 };
#else
enum { WIDE = 16 };
#endif
enum { LANES = WIDE / 16, SPAN = 64 }; /* of 16 bytes; of words that can be looked up */
typedef uint8_t bytes __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef float numbers __attribute__((vector_size(WIDE), aligned(4), may_alias));

/* words_at: WIDE words, in each lane 8 of the first half and 8 of the second. look: bytes i of a table of 32.
 * spread: floats from their three upper bytes, in each register 4 columns of each lane. store_bf16, store_f32: all
 * WIDE numbers, in the order of columns. */
#if defined(AVX512) || defined(AVX2)
#ifdef AVX512
#define M(f) _mm512_##f
#define INTEGERS(f) _mm512_##f##_si512
typedef __m512i integers;
INLINED bytes words_at(const uint8_t *p) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    return (bytes)_mm512_permutexvar_epi64(order, _mm512_loadu_si512(p));
}
INLINED void store_half(float *d, numbers a, numbers b) {
    const __m512 x = _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44);
    const __m512 y = _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
    _mm512_storeu_ps(d, _mm512_shuffle_f32x4(x, x, 0xd8));
    _mm512_storeu_ps(d + 16, _mm512_shuffle_f32x4(y, y, 0xd8));
}
#else
#define M(f) _mm256_##f
#define INTEGERS(f) _mm256_##f##_si256
typedef __m256i integers;
INLINED bytes words_at(const uint8_t *p) {
    return (bytes)_mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)p), 0xd8);
}
INLINED void store_half(float *d, numbers a, numbers b) {
    _mm256_storeu_ps(d, _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20));
    _mm256_storeu_ps(d + 8, _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31));
}
#endif
typedef struct { bytes low, high; } table; /* 16 bytes in each lane */
INLINED table table_at(const uint8_t *p) {
    table t;
    for (int lane = 0; lane < LANES; lane++) {
        memcpy((char *)&t.low + 16 * lane, p, 16);
        memcpy((char *)&t.high + 16 * lane, p + 16, 16);
    }
    return t;
}
/* Indices out of range have bit 7 set, which gives 0 */
INLINED bytes look(table t, bytes i) {
    return (bytes)M(shuffle_epi8)((integers)t.low, (integers)(i + (uint8_t)0x70)) |
           (bytes)M(shuffle_epi8)((integers)t.high, (integers)((i ^ (uint8_t)16) + (uint8_t)0x70));
}
INLINED void spread(bytes b1, bytes b2, bytes b3, numbers v[4]) {
    const integers none = INTEGERS(setzero)(), u1 = (integers)b1, u2 = (integers)b2, u3 = (integers)b3;
    const integers p = M(unpacklo_epi8)(none, u1), q = M(unpacklo_epi8)(u2, u3);
    const integers r = M(unpackhi_epi8)(none, u1), s = M(unpackhi_epi8)(u2, u3);
    v[0] = (numbers)M(unpacklo_epi16)(p, q);
    v[1] = (numbers)M(unpackhi_epi16)(p, q);
    v[2] = (numbers)M(unpacklo_epi16)(r, s);
    v[3] = (numbers)M(unpackhi_epi16)(r, s);
}
INLINED integers upper(numbers v) {
    const integers bits = (integers)v, odd = INTEGERS(and)(M(srli_epi32)(bits, 16), M(set1_epi32)(1));
    return M(srli_epi32)(M(add_epi32)(M(add_epi32)(bits, M(set1_epi32)(0x7fff)), odd), 16);
}
INLINED void store_bf16(uint16_t *d, const numbers v[4]) {
    for (int k = 0; k < 2; k++) {
        const integers both = M(packus_epi32)(upper(v[2 * k]), upper(v[2 * k + 1]));
        memcpy(d + WIDE / 2 * k, &both, WIDE);
    }
}
INLINED void store_f32(float *d, const numbers v[4]) {
    for (int k = 0; k < 2; k++) store_half(d + WIDE / 2 * k, v[2 * k], v[2 * k + 1]);
}
#undef M
#undef INTEGERS
#else
INLINED bytes words_at(const uint8_t *p) { return (bytes)vld1q_u8(p); }
typedef uint8x16x2_t table;
INLINED table table_at(const uint8_t *p) { return vld1q_u8_x2(p); }
INLINED bytes look(table t, bytes i) { return (bytes)vqtbl2q_u8(t, (uint8x16_t)i); }
INLINED void spread(bytes b1, bytes b2, bytes b3, numbers v[4]) {
    const uint8x16_t none = vdupq_n_u8(0), u1 = (uint8x16_t)b1, u2 = (uint8x16_t)b2, u3 = (uint8x16_t)b3;
    const uint16x8_t p = (uint16x8_t)vzip1q_u8(none, u1), q = (uint16x8_t)vzip1q_u8(u2, u3);
    const uint16x8_t r = (uint16x8_t)vzip2q_u8(none, u1), s = (uint16x8_t)vzip2q_u8(u2, u3);
    v[0] = (numbers)vzip1q_u16(p, q);
    v[1] = (numbers)vzip2q_u16(p, q);
    v[2] = (numbers)vzip1q_u16(r, s);
    v[3] = (numbers)vzip2q_u16(r, s);
}
INLINED void store_bf16(uint16_t *d, const numbers v[4]) {
    for (int k = 0; k < 2; k++) { /* halves up, and of what was exactly between two, the last bit away */
        const uint32x4_t a = (uint32x4_t)v[2 * k], b = (uint32x4_t)v[2 * k + 1];
        const uint16x8_t up = vrshrn_high_n_u32(vrshrn_n_u32(a, 16), b, 16);
        const uint16x8_t rest = vuzp1q_u16((uint16x8_t)a, (uint16x8_t)b);
        const uint16x8_t between = vceqq_u16(rest, vdupq_n_u16(0x8000));
        vst1q_u16(d + 8 * k, vbicq_u16(up, vshrq_n_u16(between, 15)));
    }
}
INLINED void store_f32(float *d, const numbers v[4]) {
    for (int k = 0; k < 4; k++) vst1q_f32(d + 4 * k, (float32x4_t)v[k]);
}
#endif

/* Magnitudes: bytes 1 to 3 of those of the words `low` and on, where low has the parity of `zero` */
typedef struct {
    uint8_t plane[3][SPAN], low;
    uint8_t h0, h1, front0, front1; /* of states: their last 8 bits or fewer, the bits in front of these */
    uint8_t into;                   /* the bit of these to which the first of the last 8 moves; 0: there are none */
    int wide;                       /* whether they are more than 32 words */
} lookup;

static uint8_t reversed(int32_t state) {
    int to = 0;
    for (int bit = 0; bit < 8; bit++) to |= (state >> bit & 1) << (7 - bit);
    return (uint8_t)to;
}

/* How states move on; returns 0 where they have more than 16 bits */
static int walk_of(const rac_dequant *q, lookup *of) {
    int front = 0;
    while ((q->h0 | q->h1) >> front > 255) front++;
    if (front > 8) return 0;
    const int32_t within = (1 << front) - 1;
    of->h0 = reversed(q->h0 >> front);
    of->h1 = reversed(q->h1 >> front);
    of->front0 = reversed(q->h0 & within);
    of->front1 = reversed(q->h1 & within);
    of->into = front ? (uint8_t)(1 << (8 - front)) : 0;
    return 1;
}

/* Returns 0 where magnitudes cannot be looked up */
static int lookup_of(const rac_matrix *words, const rac_dequant *q, lookup *of) {
    uint8_t low = 255, high = 0;
    for (int64_t i = 0; i < words->rows; i++) {
        const uint8_t *u = (const uint8_t *)words->at + i * words->stride;
        for (int64_t j = 0; j < words->cols; j++) {
            low = u[j] < low ? u[j] : low;
            high = u[j] > high ? u[j] : high;
        }
    }
    const int first = low - ((low ^ q->zero) & 1);
    if (high - first >= SPAN) return 0;
    memset(of->plane, 0, sizeof of->plane);
    for (int k = low; k <= high; k++) {
        uint32_t bits;
        memcpy(&bits, q->rec + k, 4);
        if (bits & 255) return 0;
        for (int b = 0; b < 3; b++) of->plane[b][k - first] = (uint8_t)(bits >> 8 * (b + 1));
    }
    of->low = (uint8_t)first;
    of->wide = high - first >= 32;
    return walk_of(q, of);
}

/* `rows` rows of WIDE columns from states on: state[0], and with `front` state[1] in front of it */
#define APART __attribute__((noinline)) /* in registers of its own */
INLINED void strip(const lookup *of, int wide, int front, int size, int64_t rows, const uint8_t *u, int64_t from, const float *col,
                   const float *row, void *dst, int64_t stride, bytes *state) {
    numbers by[4];
    for (int k = 0; k < 4; k++)
        for (int lane = 0; lane < LANES; lane++)
            memcpy((char *)(by + k) + 16 * lane, col + WIDE / 2 * (k / 2) + 8 * lane + 4 * (k % 2), 16);
    const bytes none = {0}, low = none + of->low, h0 = none + of->h0, h1 = none + of->h1;
    const bytes front0 = none + of->front0, front1 = none + of->front1, into = none + of->into;
    const table t1 = table_at(of->plane[0]), t2 = table_at(of->plane[1]), t3 = table_at(of->plane[2]);
    bytes s = state[0], t = state[1];
    for (int64_t i = 0; i < rows; i++) {
        const bytes w = words_at(u + i * from) - low, sign = (front ? t : s) & (uint8_t)0x80;
        const float across = row[i];
        bytes b1 = look(t1, w), b2 = look(t2, w), b3 = look(t3, w);
        numbers v[4];
        if (wide) {
            const bytes x = w ^ (uint8_t)32;
            b1 |= look(table_at(of->plane[0] + 32), x);
            b2 |= look(table_at(of->plane[1] + 32), x);
            b3 |= look(table_at(of->plane[2] + 32), x);
        }
        spread(b1, b2, b3 ^ sign, v);
        const bytes odd = (bytes)((w & 1) != 0), minus = (bytes)(sign != 0);
        if (front) t = (t + t) ^ ((bytes)((s & (uint8_t)0x80) != 0) & into) ^ (minus & front0) ^ (odd & front1);
        s = (s + s) ^ (minus & h0) ^ (odd & h1);
        for (int k = 0; k < 4; k++) v[k] = v[k] * by[k] * across;
        if (size == 4) store_f32((float *)dst + i * stride, v);
        else store_bf16((uint16_t *)dst + i * stride, v);
    }
    state[0] = s;
    state[1] = t;
}

APART static void strip_any(const lookup *of, int size, int64_t rows, const uint8_t *u, int64_t from, const float *col,
                      const float *row, void *dst, int64_t stride, bytes *state) {
#define AS(wide, front, size) strip(of, wide, front, size, rows, u, from, col, row, dst, stride, state)
    if (of->into) {
        if (of->wide) size == 2 ? AS(1, 1, 2) : AS(1, 1, 4);
        else size == 2 ? AS(0, 1, 2) : AS(0, 1, 4);
    } else if (of->wide) size == 2 ? AS(1, 0, 2) : AS(1, 0, 4);
    else size == 2 ? AS(0, 0, 2) : AS(0, 0, 4);
#undef AS
}

/* Fewer than WIDE columns, in a copy as wide */
static void narrow(const lookup *of, const rac_matrix *words, int size, const float *col, const float *row,
                   const rac_matrix *dst) {
    const size_t w = (size_t)words->cols, bytes_of = (size_t)size;
    uint8_t u[STRIP * WIDE] = {0};
    float by[WIDE] = {0};
    uint32_t v[STRIP * WIDE];
    bytes state[2] = {{0}};
    memcpy(by, col, 4 * w);
    for (int64_t top = 0; top < words->rows; top += STRIP) {
        const int64_t rows = least(words->rows - top, STRIP);
        for (int64_t i = 0; i < rows; i++)
            memcpy(u + i * WIDE, (const uint8_t *)words->at + (top + i) * words->stride, w);
        strip_any(of, size, rows, u, WIDE, by, row + top, v, WIDE, state);
        for (int64_t i = 0; i < rows; i++)
            memcpy((char *)dst->at + (top + i) * dst->stride * size, (char *)v + i * WIDE * size, w * bytes_of);
    }
}

/* A tile; the last columns are those behind the others and as many before as a register has room for: they are decoded
 * twice, to the same numbers */
void rac_untrellis(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                   const rac_matrix *dst, uint16_t *states) {
    lookup of;
    const int64_t h = words->rows, w = words->cols;
    if (!lookup_of(words, q, &of)) untrellis_any(words, q, col, row, dst, states);
    else if (w < WIDE) narrow(&of, words, q->size, col, row, dst);
    else {
        memset(states, 0, 2 * (size_t)(w + WIDE - 1));
        for (int64_t top = 0; top < h; top += STRIP)
            for (int64_t block = 0; block < w; block += WIDE) {
                const int64_t j = least(block, w - WIDE), at = top * dst->stride + j;
                strip_any(&of, q->size, least(h - top, STRIP), (const uint8_t *)words->at + top * words->stride + j,
                          words->stride, col + j, row + top, (char *)dst->at + at * q->size, dst->stride,
                          (bytes *)(states + block));
            }
    }
}
#else
/* `states`: room for one of each column and 63 more */
void rac_untrellis(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                   const rac_matrix *dst, uint16_t *states) {
    untrellis_any(words, q, col, row, dst, states);
}
#endif

/* n numbers to words of F32 (kind 4) or BF16 (kind 2), to the nearest, ties to even; a NaN to the canonical one */
void rac_round(const uint32_t *v, int64_t n, void *dst, int kind) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = v[i], nan = (bits & 0x7fffffff) > 0x7f800000;
        if (kind == 4) ((uint32_t *)dst)[i] = nan ? 0x7fc00000 : bits;
        else ((uint16_t *)dst)[i] = (uint16_t)(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
