/* Heads of records (format_spec/container.md, "Records" and "Tensor records"): those that most tensors have. One that says
 * anything else, or is wrong, is declined and not judged: the twin, rac/tensor.py, reads it or says what is wrong. */
#include "records.h"

/* Canonical msgpack that is read from front to back; `bad` once anything is not as it should be, and then all is 0 */
typedef struct {
    const uint8_t *at, *end;
    int bad;
} reader;

/* The next n bytes; null where there are fewer */
static const uint8_t *take(reader *r, int64_t n) {
    if (r->bad || r->end - r->at < n) {
        r->bad = 1;
        return 0;
    }
    r->at += n;
    return r->at - n;
}

static void expect(reader *r, const void *bytes, int64_t n) {
    const uint8_t *p = take(r, n);
    if (!p || memcmp(p, bytes, (size_t)n)) r->bad = 1;
}

#define EXPECT(r, text) expect(r, text, sizeof text - 1)

/* A big-endian integer of n bytes that needs them: it is `least` or more */
static uint64_t big(reader *r, int n, uint64_t least) {
    const uint8_t *p = take(r, n);
    uint64_t v = 0;
    for (int i = 0; p && i < n; i++) v = v << 8 | p[i];
    if (v < least) r->bad = 1;
    return v;
}

/* An integer of 0 to `most`, below 2^62 */
static int64_t number(reader *r, int64_t low, int64_t most) {
    const uint8_t *p = take(r, 1);
    uint64_t v = 0;
    if (!p) return 0;
    if (*p < 0x80) v = *p;
    else if (*p == 0xcc) v = big(r, 1, 0x80);
    else if (*p == 0xcd) v = big(r, 2, 0x100);
    else if (*p == 0xce) v = big(r, 4, 0x10000);
    else if (*p == 0xcf) v = big(r, 8, (uint64_t)1 << 32);
    else r->bad = 1;
    if (v > (uint64_t)most || v < (uint64_t)low) r->bad = 1;
    return r->bad ? 0 : (int64_t)v;
}

/* The number of items of a list, at most 65535 */
static int64_t list(reader *r) {
    const uint8_t *p = take(r, 1);
    if (!p) return 0;
    if (*p >> 4 == 9) return *p & 15;
    if (*p == 0xdc) return (int64_t)big(r, 2, 16);
    r->bad = 1;
    return 0;
}

/* Parameters of lanes/1 (stages/lanes.md, "Parameters"), but for planes in frames */
static void lanes(reader *r, int word, rac_stated *s) {
    rac_shared *p = &s->shared;
    const int bits = 8 * word;
    uint32_t escapes[256];
    uint16_t runs[512];
    memset(s->values, 0, sizeof s->values);
    memset(s->bases, 0, sizeof s->bases);
    EXPECT(r, "\x8e\xa4" "cols");
    p->col_classes = (int32_t)number(r, 1, 256);
    EXPECT(r, "\xa7" "escapes");
    const int64_t ne = list(r);
    if (ne > 256) r->bad = 1;
    for (int64_t i = 0; i < ne && !r->bad; i++) escapes[i] = (uint32_t)number(r, 0, 65535);
    EXPECT(r, "\xa2" "id" "\xa7" "lanes/1" "\xa5" "lanes");
    p->lanes = (int32_t)number(r, 1, 1024);
    EXPECT(r, "\xa5" "order");
    if (r->at < r->end && *r->at >= 0xf8) s->order = (int8_t)*r->at++;
    else s->order = number(r, 0, 8);
    EXPECT(r, "\xa6" "packed" "\x00\xa3" "per");
    p->per = (int32_t)number(r, 1, 2);
    EXPECT(r, "\xa4" "rows");
    p->row_classes = (int32_t)number(r, 1, 256);
    EXPECT(r, "\xa4" "runs");
    const int64_t nr = list(r);
    if (nr > 512 || nr % 2) r->bad = 1;
    for (int64_t i = 0; i < nr && !r->bad; i++) runs[i] = (uint16_t)number(r, i % 2, i % 2 ? 256 : 65535);
    EXPECT(r, "\xa5" "shift");
    p->shift = (int32_t)number(r, 0, bits - 1);
    EXPECT(r, "\xa4" "sign");
    p->sign = (int32_t)number(r, 0, 1);
    EXPECT(r, "\xa5" "sizes\x93");
    for (int i = 0; i < 3; i++) s->sizes[i] = number(r, 0, (int64_t)1 << 40);
    EXPECT(r, "\xa6" "tables");
    s->tables = number(r, 1, 256);
    EXPECT(r, "\xa4" "zero");
    p->zero = (int32_t)number(r, 0, bits - 1);
    const int top = bits - p->zero - p->sign - p->shift;
    if (r->bad || top < 1 || p->row_classes * p->col_classes > 4096) {
        r->bad = 1;
        return;
    }
    const uint32_t limit = p->limit = 1u << least(top, 16);
    uint32_t end = 0, first = 0;
    for (int64_t i = 0; i < nr; i += 2) {
        const uint32_t start = runs[i], n = runs[i + 1];
        if (start < end || start + n > limit || first + n > 256) {
            r->bad = 1;
            return;
        }
        for (uint32_t k = 0; k < n; k++) s->values[first + k] = (uint16_t)(start + k);
        first += n;
        end = start + n;
    }
    for (int64_t i = 0; i < ne; i++) {
        if (escapes[i] >= limit) r->bad = 1;
        s->bases[i] = escapes[i];
    }
    p->first = (int32_t)first;
    p->base = (int32_t)(first + ne);
    if (p->base < 2 || p->base > (p->per == 1 ? 256 : 16)) r->bad = 1;
    p->skip = 0;
    p->word = word;
    p->raw = p->shift + p->sign;
    s->front = s->sizes[0] + s->sizes[1] + s->sizes[2] + p->row_classes * p->col_classes;
}

/* The bytes of a text, and how many; null where the next value is none */
static const uint8_t *text(reader *r, int64_t *n) {
    const uint8_t *p = take(r, 1);
    *n = 0;
    if (p && *p >> 5 == 5) *n = *p & 31;
    else if (p && *p == 0xd9) *n = (int64_t)big(r, 1, 32);
    else if (p && *p == 0xda) *n = (int64_t)big(r, 2, 256);
    else r->bad = 1;
    return take(r, *n);
}

/* What the source says beyond the format: texts and numbers without a map among them, and nothing but ASCII */
static void extra(reader *r) {
    const uint8_t *p = take(r, 1), *before = 0;
    int64_t last = 0, n;
    if (!p || *p >> 4 != 8) r->bad = 1;
    for (int items = r->bad ? 0 : *p & 15; items && !r->bad; items--) {
        const uint8_t *key = text(r, &n), *value = key;
        for (int64_t i = 0; key && i < n; i++)
            if (key[i] > 0x7f) r->bad = 1;
        if (key && before) {
            const int order = memcmp(before, key, (size_t)least(last, n));
            if (order > 0 || (order == 0 && last >= n)) r->bad = 1;
        }
        before = key;
        last = n;
        if (r->at < r->end && (*r->at < 0x80 || *r->at >> 2 == 0x33)) {
            number(r, 0, (int64_t)1 << 62);
            continue;
        }
        value = text(r, &n);
        for (int64_t i = 0; value && i < n; i++)
            if (value[i] > 0x7f) r->bad = 1;
    }
}

/* Data type, name and shape, which are those that the index states: rows and columns of the matrix that `axis` makes */
static void shape(reader *r, const rac_run *run, const rac_record *rec, int more, int64_t axis, rac_stated *s) {
    const uint8_t *stated = run->text + rec->stated;
    reader t = {stated, stated + rec->stated_size, 0};
    int64_t n, size;
    text(&t, &n);
    text(&t, &n);
    expect(r, stated, t.at - stated);
    if (more) {
        EXPECT(r, "\xa5" "extra");
        extra(r);
    }
    expect(r, t.at, t.end - t.at);
    text(&t, &n);
    text(&t, &n);
    EXPECT(&t, "\xa5" "shape");
    const int64_t rank = list(&t);
    s->rows = s->cols = 1;
    for (int64_t i = 0; i < rank && !t.bad; i++) {
        int64_t *of = i < axis ? &s->rows : &s->cols;
        if (__builtin_mul_overflow(*of, number(&t, 1, (int64_t)1 << 59), of)) t.bad = 1;
    }
    const int over = __builtin_mul_overflow(s->rows, s->cols, &size) || __builtin_mul_overflow(size, rec->word, &size);
    if (t.bad || t.at != t.end || axis > rank || over || size != rec->size) r->bad = 1;
}

/* The units fill the payload, and none is larger than it can need */
static int units(reader *r, const rac_record *rec, rac_stated *s) {
    EXPECT(r, "\xa5" "units");
    const uint8_t *p = take(r, 1);
    const int64_t size = !p ? -1 : *p == 0xc4 ? (int64_t)big(r, 1, 0) : *p == 0xc5 ? (int64_t)big(r, 2, 256)
                       : *p == 0xc6 ? (int64_t)big(r, 4, 65536) : -1;
    const int64_t first = s->front >= 0, down = (s->rows + s->tall - 1) / s->tall, across = (s->cols + s->wide - 1) / s->wide;
    if (r->bad || r->end - r->at != size || size % 16 || __builtin_mul_overflow(down, across, &s->tiles)) return 0;
    const int64_t n = size / 16, most = 2 * s->tall * s->wide * rec->word + 65536;
    if (s->tiles != n - first) return 0;
    s->units = r->at;
    int64_t end = 0;
    for (int64_t i = 0; i < n; i++) {
        uint64_t one;
        memcpy(&one, s->units + 16 * i, 8);
        if (one > (uint64_t)(rec->payload - end) || (i < first ? (int64_t)one != s->front : (int64_t)one > most)) return 0;
        end += up16((int64_t)one);
    }
    return end == rec->payload;
}

/* What the head of a record says, whose 24 first bytes and map go to `copy`; 0 where it is declined */
int rac_head(const rac_run *run, const rac_record *rec, uint8_t *copy, rac_stated *s) {
    const int64_t start = rec->at + up64(32 + rec->head), end = start + up64(rec->payload);
    if (rec->at < 0 || rec->head < 0 || rec->payload < 0 || end > run->size) return 0;
    const uint8_t *p = run->data + rec->at;
    uint64_t payload, check;
    uint32_t head;
    memcpy(copy, p, 24);
    memcpy(&check, p + 24, 8);
    memcpy(copy + 24, p + 32, (size_t)rec->head);
    memcpy(&head, copy + 8, 4);
    memcpy(&payload, copy + 16, 8);
    if (memcmp(copy, "RREC\x01\0\0\0", 8) || head != rec->head || memcmp(copy + 12, "\0\0\0\0", 4)) return 0;
    if (payload != (uint64_t)rec->payload || check != rec->check || rac_xxh3(copy, 24 + rec->head) != check) return 0;
    for (const uint8_t *zero = p + 32 + rec->head; zero < run->data + start; zero++)
        if (*zero) return 0;
    for (const uint8_t *zero = run->data + start + rec->payload; zero < run->data + end; zero++)
        if (*zero) return 0;
    s->payload = start;
    reader r = {copy + 24, copy + 24 + rec->head, 0};
    const int more = rec->head && *r.at == 0x89; /* keys than 8 */
    expect(&r, more ? "\x89" : "\x88", 1);
    EXPECT(&r, "\xa4" "axis");
    const int64_t axis = number(&r, 0, 65535);
    EXPECT(&r, "\xa6" "digest\xc4\x10");
    take(&r, 16);
    shape(&r, run, rec, more, axis, s);
    EXPECT(&r, "\xa6" "stages\x91");
    s->front = -1;
    if (rec->coder == LANES) lanes(&r, rec->word, s);
    else if (rec->coder == RAW) EXPECT(&r, "\x81\xa2" "id" "\xa5" "raw/1");
    else EXPECT(&r, "\x81\xa2" "id" "\xa6" "zstd/1");
    EXPECT(&r, "\xa4" "tile\x92");
    s->tall = number(&r, 1, s->rows);
    s->wide = number(&r, 1, s->cols);
    int64_t tile;
    if (r.bad || __builtin_mul_overflow(s->tall * rec->word, s->wide, &tile) || tile > run->tile) return 0;
    return units(&r, rec, s);
}
