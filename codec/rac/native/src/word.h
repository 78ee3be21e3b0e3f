/* What is done to words of one size, for the encoder and the decoder of tiles: included once for each SIZE in bytes,
 * whose type is WORD; OF(f) names its functions. */
#define JOIN(a, b) a##b
#define JOINED(a, b) JOIN(a, b)
#define OF(name) JOINED(name, SIZE)
enum { OF(BITS) = 8 * SIZE };

/* hist[(v & mask) >> shift] += 1 for n words; returns the OR of all words */
uint64_t OF(rac_scan)(const WORD *v, int64_t n, uint64_t mask, int shift, uint32_t *hist) {
    const WORD m = (WORD)mask;
    WORD all = 0;
    int64_t i = 0;
    const uint64_t size = (mask >> shift) + 1;
    if (size <= 256) {
        enum { PIECE = 3840 }; /* a multiple of all vectors */
        uint8_t top[PIECE];
        for (; i + PIECE <= n; i += PIECE) {
            for (int64_t k = 0; k < PIECE; k++) {
                all |= v[i + k];
                top[k] = (uint8_t)((v[i + k] & m) >> shift);
            }
            rac_bytes(top, PIECE, hist);
        }
    }
    for (; i < n; i++) {
        all |= v[i];
        hist[(uint16_t)((v[i] & m) >> shift)]++;
    }
    return all;
}

/* lut[word top] for every word; lut: 65536 */
void OF(rac_symbols)(const void *words, int64_t n, int zero, int sign, int shift, const uint8_t *lut, uint8_t *out) {
    const WORD *v = words;
    const int down = zero + shift, bits = OF(BITS) - down - sign;
    const uint64_t top = bits < 64 ? ((uint64_t)1 << bits) - 1 : ~(uint64_t)0;
    int64_t i = 0;
    if (bits <= 8) i = OF(looked_up_)(v, n, down, bits, lut, out);
#if SIZE == 2 && defined NEON
    else i = looked_up_more(v, n, down, bits, lut, out);
#endif
    for (; i < n; i++) out[i] = lut[(uint16_t)(v[i] >> down & (WORD)top)];
}

/* Elements of a tile to sequence order, block by block; row, col: sorted by class, or null. Up to 7 columns behind the
 * last of `col` are read, and up to 63 bytes behind the last element are written */
void OF(rac_gather)(const void *tile, int64_t stride, const int32_t *row, const int32_t *col, const rac_block *b,
                    int64_t n, void *to) {
    const WORD *src = tile;
    WORD *out = to;
    int64_t cols = 0;
    for (int64_t k = 0; k < n; k++) cols = b[k].c1 > cols ? b[k].c1 : cols;
    for (const rac_block *end = b + n; b < end; b++) {
        const int64_t m = b->c1 - b->c0;
        if (col && OF(runs512_)(src, stride, row, col, b, cols, out)) {
            out += (b->r1 - b->r0) * m;
            continue;
        }
        for (int64_t i = b->r0; i < b->r1; i++, out += m) {
            const WORD *s = src + (row ? row[i] : i) * stride;
            if (col) {
                for (int64_t c = 0; c < m; c += 8) /* runs are short: what is too much is written over */
                    for (int64_t k = c; k < c + 8; k++) out[k] = s[col[b->c0 + k]];
            } else if (m * SIZE < 512) copy_run(out, s + b->c0, m * SIZE);
            else memcpy(out, s + b->c0, (size_t)m * SIZE);
        }
    }
}

/* Bits `at` and on of m words, at most CHUNK of them, elements `first` and on, to their plane of b bits */
static void OF(put_plane)(const WORD *raw, int64_t first, int64_t m, int b, int at, uint8_t *plane) {
#define WHOLE(kind, as) for (int64_t i = 0; i < m; i++) ((kind *)plane)[first + i] = (kind)((as)raw[i] >> at)
    if (b == 32) WHOLE(uint32_t, uint64_t);
    else if (b == 16) WHOLE(uint16_t, WORD);
    else if (b == 8) WHOLE(uint8_t, WORD);
    else {
        uint8_t fields[CHUNK + 8] = {0};
        const uint8_t mask = (uint8_t)((1 << b) - 1);
        for (int64_t i = 0; i < m; i++) fields[i] = (uint8_t)(raw[i] >> at) & mask;
        pack_fields(fields, m, b, plane + first * b / 8);
    }
#undef WHOLE
}

/* Raw bits of n words to their planes, largest plane first, which begin at out + start[0], ... */
void OF(rac_planes)(const void *words, int64_t n, int zero, int sign, int shift, uint8_t *out, const int64_t *start) {
    const WORD *v = words;
    WORD raw[CHUNK];
    const WORD low = (WORD)(((WORD)1 << shift) - 1);
    const int at_sign = OF(BITS) - zero - 1;
    if (sign && shift == 7) { /* a byte of each */
        uint8_t *plane = out + start[0];
        const int high = OF(BITS) - 8;
        if (zero)
            for (int64_t i = 0; i < n; i++) plane[i] = (uint8_t)((v[i] >> zero & 127) | (v[i] >> high & 128));
        else
            for (int64_t i = 0; i < n; i++) plane[i] = (uint8_t)((v[i] & 127) | (v[i] >> high & 128));
        return;
    }
    for (int64_t f = 0; f < n; f += CHUNK, v += CHUNK) {
        const int64_t m = least(n - f, CHUNK);
        if (sign)
            for (int64_t i = 0; i < m; i++) {
                const WORD x = (WORD)(v[i] >> zero);
                raw[i] = (WORD)((WORD)(x & low) | (WORD)((WORD)(x >> at_sign) << shift));
            }
        else
            for (int64_t i = 0; i < m; i++) raw[i] = (WORD)((WORD)(v[i] >> zero) & low);
        for (int b = 32, k = 0, at = 0; b; b >>= 1) {
            if (!((shift + sign) & b)) continue;
            OF(put_plane)(raw, f, m, b, at, out + start[k++]);
            at += b;
        }
    }
}

/* Plane of b bits to the bits `low` and on of n words, elements `at` and on of the plane */
static void OF(add_plane)(const uint8_t *p, int b, int low, int64_t at, int64_t n, WORD *raw) {
#define WHOLE(kind, as) for (int64_t i = 0; i < n; i++) raw[i] |= (WORD)((as)((const kind *)p)[at + i] << low)
    if (b == 32) WHOLE(uint32_t, uint64_t);
    else if (b == 16) WHOLE(uint16_t, WORD);
    else if (b == 8) WHOLE(uint8_t, WORD);
    else if (b == 4 && !(at & 1)) {
        const uint8_t *q = p + (at >> 1);
        for (int64_t i = 0; i < n >> 1; i++) {
            raw[2 * i] |= (WORD)((WORD)(q[i] & 15) << low);
            raw[2 * i + 1] |= (WORD)((WORD)(q[i] >> 4) << low);
        }
        if (n & 1) raw[n - 1] |= (WORD)((WORD)(q[n >> 1] & 15) << low);
    } else {
        const int per = 8 / b, lg = b == 4 ? 1 : b == 2 ? 2 : 3, mask = (1 << b) - 1;
        for (int64_t i = 0; i < n; i++)
            raw[i] |= (WORD)((WORD)(p[(at + i) >> lg] >> ((at + i) & (per - 1)) * b & mask) << low);
    }
#undef WHOLE
}

/* raw[i] = bits of element at + i from the planes of `r` bits together, largest first, lowest bits in the largest */
static void OF(raw_bits)(const uint8_t *planes, const int64_t *start, int r, int64_t at, int64_t n, WORD *raw) {
    if (r == 8) {
        const uint8_t *q = planes + start[0] + at;
        for (int64_t i = 0; i < n; i++) raw[i] = q[i];
        return;
    }
    for (int64_t i = 0; i < n; i++) raw[i] = 0;
    for (int b = 32, low = 0; b; b >>= 1) {
        if (!(r & b)) continue;
        OF(add_plane)(planes + *start++, b, low, at, n, raw);
        low += b;
    }
}

/* n elements from place `e` of block `b`, element `at` of the tile, whose tops are `top`: to words at their places */
void OF(rac_place)(const rac_tile *w, const uint16_t *top, int64_t n, int64_t e, int64_t at, const rac_block *b) {
    const rac_shared *s = w->shared;
    WORD raw[CHUNK];
    const int shift = s->shift, zero = s->zero, at_sign = OF(BITS) - zero - 1;
    const WORD low = (WORD)(((WORD)1 << shift) - 1);
    const int64_t cols = b->c1 - b->c0;
    const int32_t *col = w->col ? w->col + b->c0 : 0;
    int64_t i = b->r0 + e / cols, c = e % cols;
    for (int64_t f = 0; f < n; f += CHUNK, top += CHUNK) {
        const int64_t m = least(n - f, CHUNK);
        OF(raw_bits)(w->planes, w->start, s->raw, at + f, m, raw);
        if (s->sign)
            for (int64_t q = 0; q < m; q++) {
                const WORD sign = (WORD)((WORD)(raw[q] >> shift) << at_sign);
                raw[q] = (WORD)((WORD)((WORD)((WORD)top[q] << shift) | (WORD)(raw[q] & low) | sign) << zero);
            }
        else
            for (int64_t q = 0; q < m; q++)
                raw[q] = (WORD)((WORD)((WORD)((WORD)top[q] << shift) | (WORD)(raw[q] & low)) << zero);
        if (w->seq) {
            memcpy((WORD *)w->seq + at + f, raw, (size_t)m * SIZE);
            continue;
        }
        for (int64_t q = 0; q < m;) {
            const int64_t k = least(cols - c, m - q);
            WORD *d = (WORD *)w->dst + (w->row ? w->row[i] : i) * w->stride;
            if (col)
                for (int64_t x = 0; x < k; x++) d[col[c + x]] = raw[q + x];
            else copy_run(d + b->c0 + c, raw + q, k * SIZE);
            q += k;
            c += k;
            if (c == cols) {
                c = 0;
                i++;
            }
        }
    }
}
#undef JOIN
#undef JOINED
#undef OF
