/* XXH3-64 with seed 0, as its specification has it (xxhash's doc/xxhash_spec.md): the checksum of a unit right before it is
 * decoded, outside the interpreter's lock. Twin: the package xxhash (rac/container/zstd.py). */
#include "tile.h"

enum { STRIPE = 64, BLOCK = 16 * STRIPE }; /* a block goes through all of the secret, 8 bytes further for each stripe */
static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u;
static const uint64_t P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u;
static const uint8_t secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint64_t at64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static inline uint32_t at32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* `n` stripes, each with its part of the secret, to the accumulators */
static void add(uint64_t *acc, const uint8_t *p, const uint8_t *key, int64_t n) {
#ifdef AVX512
    __m512i a = _mm512_loadu_si512(acc);
    for (int64_t i = 0; i < n; i++) {
        const __m512i v = _mm512_loadu_si512(p + STRIPE * i), k = _mm512_xor_si512(v, _mm512_loadu_si512(key + 8 * i));
        a = _mm512_add_epi64(a, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0x4e)); /* neighbours, the other way round */
        a = _mm512_add_epi64(a, _mm512_mul_epu32(k, _mm512_srli_epi64(k, 32)));
    }
    _mm512_storeu_si512(acc, a);
#elif defined(AVX2)
    __m256i a[2] = {_mm256_loadu_si256((const void *)acc), _mm256_loadu_si256((const void *)(acc + 4))};
    for (int64_t i = 0; i < n; i++)
        for (int h = 0; h < 2; h++) {
            const __m256i v = _mm256_loadu_si256((const void *)(p + STRIPE * i + 32 * h));
            const __m256i k = _mm256_xor_si256(v, _mm256_loadu_si256((const void *)(key + 8 * i + 32 * h)));
            a[h] = _mm256_add_epi64(a[h], _mm256_shuffle_epi32(v, 0x4e));
            a[h] = _mm256_add_epi64(a[h], _mm256_mul_epu32(k, _mm256_srli_epi64(k, 32)));
        }
    _mm256_storeu_si256((void *)acc, a[0]);
    _mm256_storeu_si256((void *)(acc + 4), a[1]);
#else
    uint64_t a[8];
    memcpy(a, acc, sizeof a);
    for (int64_t i = 0; i < n; i++)
        for (int x = 0; x < 8; x++) {
            const uint64_t v = at64(p + STRIPE * i + 8 * x), k = v ^ at64(key + 8 * i + 8 * x);
            a[x ^ 1] += v;
            a[x] += (uint64_t)(uint32_t)k * (k >> 32);
        }
    memcpy(acc, a, sizeof a);
#endif
}

static uint64_t folded(uint64_t a, uint64_t b) {
    const unsigned __int128 v = (unsigned __int128)a * b;
    return (uint64_t)v ^ (uint64_t)(v >> 64);
}

static uint64_t spread(uint64_t h) {
    h = (h ^ h >> 37) * 0x165667919E3779F9u;
    return h ^ h >> 32;
}

/* The avalanche of XXH64, for the shortest */
static uint64_t spread_few(uint64_t h) {
    h = (h ^ h >> 33) * P64_2;
    h = (h ^ h >> 29) * P64_3;
    return h ^ h >> 32;
}

static uint64_t rotated(uint64_t v, int by) { return v << by | v >> (64 - by); }

/* Up to 16 bytes */
static uint64_t few(const uint8_t *p, int64_t n) {
    if (n > 8) {
        const uint64_t low = at64(p) ^ at64(secret + 24) ^ at64(secret + 32);
        const uint64_t high = at64(p + n - 8) ^ at64(secret + 40) ^ at64(secret + 48);
        return spread((uint64_t)n + __builtin_bswap64(low) + high + folded(low, high));
    }
    if (n > 3) {
        uint64_t h = ((uint64_t)at32(p) << 32 | at32(p + n - 4)) ^ at64(secret + 8) ^ at64(secret + 16);
        h = (h ^ rotated(h, 49) ^ rotated(h, 24)) * 0x9FB21C651E98DF25u;
        h = (h ^ ((h >> 35) + (uint64_t)n)) * 0x9FB21C651E98DF25u;
        return h ^ h >> 28;
    }
    if (!n) return spread_few(at64(secret + 56) ^ at64(secret + 64));
    const uint32_t all = (uint32_t)p[0] << 16 | (uint32_t)p[n >> 1] << 24 | p[n - 1] | (uint32_t)n << 8;
    return spread_few(all ^ at32(secret) ^ at32(secret + 4));
}

static uint64_t mixed(const uint8_t *p, const uint8_t *key) {
    return folded(at64(p) ^ at64(key), at64(p + 8) ^ at64(key + 8));
}

/* 17 to 240 bytes */
static uint64_t some(const uint8_t *p, int64_t n) {
    uint64_t h = (uint64_t)n * P64_1;
    if (n <= 128) {
        for (int64_t i = (n - 1) / 32; i >= 0; i--)
            h += mixed(p + 16 * i, secret + 32 * i) + mixed(p + n - 16 * (i + 1), secret + 32 * i + 16);
        return spread(h);
    }
    for (int64_t i = 0; i < 8; i++) h += mixed(p + 16 * i, secret + 16 * i);
    h = spread(h);
    for (int64_t i = 8; i < n / 16; i++) h += mixed(p + 16 * i, secret + 16 * (i - 8) + 3);
    return spread(h + mixed(p + n - 16, secret + 119));
}

uint64_t rac_xxh3(const uint8_t *p, int64_t n) {
    if (n <= 240) return n > 16 ? some(p, n) : few(p, n);
    uint64_t acc[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1}, h = (uint64_t)n * P64_1;
    const int64_t blocks = (n - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; b++) {
        add(acc, p + BLOCK * b, secret, BLOCK / STRIPE);
        for (int x = 0; x < 8; x++) acc[x] = (acc[x] ^ acc[x] >> 47 ^ at64(secret + 128 + 8 * x)) * P32_1;
    }
    add(acc, p + BLOCK * blocks, secret, (n - 1 - BLOCK * blocks) / STRIPE);
    add(acc, p + n - STRIPE, secret + 121, 1); /* the last stripe, which may overlap the one before */
    for (int x = 0; x < 8; x += 2) h += folded(acc[x] ^ at64(secret + 11 + 8 * x), acc[x + 1] ^ at64(secret + 19 + 8 * x));
    return spread(h);
}
