/* Whole tensors that lie side by side in a file (format_spec/container.md, stages/raw.md, zstd.md and lanes.md): all that
 * Python would do for each of them, in two calls. Between the two the caller expands Zstandard frames. A record that is
 * declined is read by the twins, rac/tensor.py and rac/stages. */
#include "records.h"

int rac_tables(const uint8_t *in, int64_t size, int64_t count, int64_t n, int order, uint16_t *freq);
void rac_lookup(const uint16_t *freq, int64_t count, int64_t n, const uint8_t *code, uint32_t *out);
int rac_spans(const rac_span *spans, int64_t n, int64_t *at);

/* Memory that is handed out from front to back */
typedef struct { uint8_t *at, *end; } arena;

/* n bytes, aligned to 64; null where there are fewer */
static void *hand_out(arena *a, int64_t n) {
    if (n > a->end - a->at - 64) return 0;
    uint8_t *out = a->at + (-(uintptr_t)a->at & 63);
    a->at = out + n;
    return out;
}

/* What the frames of a record hold, one after the other */
typedef struct { const uint8_t *at, *end; } expanded;

static int frame(rac_frame *f, int64_t at, int64_t size, int64_t holds) {
    *f = (rac_frame){at, size, holds, 0};
    return 1;
}

/* The frames of a record, at most 2 of them; returns how many, -1 where it is declined */
static int frames_of(const rac_record *r, const rac_stated *s, rac_frame *f) {
    const rac_shared *p = &s->shared;
    if (r->coder == RAW) return 0;
    if (r->coder == ZSTD) return s->tiles == 1 ? frame(f, s->payload, size_of_unit(s->units, 0), r->size) : -1;
    if ((p->row_classes == 1 && s->sizes[1]) || (p->col_classes == 1 && s->sizes[2])) return -1;
    int n = 0;
    const int64_t at = s->payload + s->sizes[0];
    if (p->row_classes > 1 && s->sizes[1] != s->rows) n += frame(f + n, at, s->sizes[1], s->rows);
    if (p->col_classes > 1 && s->sizes[2] != s->cols) n += frame(f + n, at + s->sizes[1], s->sizes[2], s->cols);
    return n;
}

/* Look at the heads of a run: `state` of each record becomes 1, or 0 where it is declined, and `frames` (2 for each at most)
 * those that are to be expanded; returns how many, -1 where memory is short */
int64_t rac_heads(const rac_record *record, int64_t n, const uint8_t *text, const uint8_t *data, int64_t size,
                  int64_t tile, uint8_t *state, rac_frame *frames) {
    const rac_run run = {record, text, data, size, tile};
    int64_t most = 0, found = 0;
    for (int64_t i = 0; i < n; i++) most = record[i].head > most ? record[i].head : most;
    uint8_t *copy = malloc((size_t)most + 24);
    if (!copy) return -1;
    for (int64_t i = 0; i < n; i++) {
        rac_stated s;
        const int here = rac_head(&run, record + i, copy, &s) ? frames_of(record + i, &s, frames + found) : -1;
        state[i] = here >= 0;
        for (int k = 0; k < here; k++) frames[found++].record = i;
    }
    free(copy);
    return found;
}

/* Whether the bytes behind each unit, up to a multiple of 16, are 0 */
static int padded(const uint8_t *payload, const rac_stated *s) {
    const int64_t n = s->tiles + (s->front >= 0);
    for (int64_t i = 0; i < n; i++) {
        const int64_t size = size_of_unit(s->units, i);
        for (int64_t k = size; k < up16(size); k++)
            if (payload[k]) return 0;
        payload += up16(size);
    }
    return 1;
}

/* Whether a unit has the checksum that is stated */
static int sound(const uint8_t *unit, const rac_stated *s, int64_t i) {
    uint64_t check;
    memcpy(&check, s->units + 16 * i + 8, 8);
    return rac_xxh3(unit, size_of_unit(s->units, i)) == check;
}

/* The words of raw/1 to their places */
static int raw(const rac_run *run, const rac_record *r, const rac_stated *s) {
    const uint8_t *unit = run->data + s->payload;
    const int64_t across = (s->cols + s->wide - 1) / s->wide;
    for (int64_t i = 0; i < s->tiles; i++) {
        const int64_t row = i / across * s->tall, col = i % across * s->wide;
        const int64_t h = least(s->tall, s->rows - row), w = least(s->wide, s->cols - col) * r->word;
        if (size_of_unit(s->units, i) != h * w || !sound(unit, s, i)) return 0;
        for (int64_t k = 0; k < h; k++)
            memcpy((uint8_t *)r->out + ((row + k) * s->cols + col) * r->word, unit + k * w, (size_t)w);
        unit += up16(h * w);
    }
    return 1;
}

/* Words of one tile under zstd/1 from their bytes, all lowest bytes first */
static int sorted(const rac_run *run, const rac_record *r, const rac_stated *s, expanded *e) {
    if (!sound(run->data + s->payload, s, 0) || e->end - e->at < r->size) return 0;
    const int64_t n = r->size / r->word;
    for (int b = 0; b < r->word; b++, e->at += n)
        for (int64_t i = 0; i < n; i++) ((uint8_t *)r->out)[i * r->word + b] = e->at[i];
    return 1;
}

/* Classes of n rows or columns, in *stored of the front unit or expanded; null where there is one class. 0: wrong */
static int classes(const uint8_t *stored, int64_t size, int64_t n, int k, expanded *e, const uint8_t **out) {
    *out = 0;
    if (k == 1) return size == 0;
    *out = stored;
    if (size != n) {
        if (e->end - e->at < n) return 0;
        *out = e->at;
        e->at += n;
    }
    for (int64_t i = 0; i < n; i++)
        if ((*out)[i] >= k) return 0;
    return 1;
}

/* Base symbols of coded ones: pairs with an escape come last */
static void fill_codes(const rac_shared *p, uint8_t *code) {
    int at = 0;
    if (p->per == 1)
        for (int a = 0; a < p->base; a++) code[a] = (uint8_t)a;
    else
        for (int escaping = 0; escaping < 2; escaping++)
            for (int b = 0; b < p->base; b++)
                for (int a = 0; a < p->base; a++)
                    if ((a >= p->first || b >= p->first) == escaping) code[at++] = (uint8_t)(a | b << 4);
}

/* The tiles of lanes/1: a span for rac_spans, what it needs in memory of the arena. -1: there is too little, 0: wrong */
static int open_lanes(const rac_run *run, const rac_record *r, rac_stated *s, arena *a, expanded *e, rac_span *span) {
    rac_shared *p = &s->shared;
    const int64_t symbols = p->per == 1 ? p->base : p->base * p->base, *sizes = s->sizes;
    uint8_t code[256], *front = hand_out(a, s->front);
    uint16_t *freq = hand_out(a, s->tables * symbols * 2);
    uint32_t *luts = hand_out(a, s->tables * 4096 * 4);
    if (!front || !freq || !luts) return -1;
    const uint8_t *payload = run->data + s->payload;
    memcpy(front, payload, (size_t)s->front);
    if (!sound(front, s, 0) || rac_tables(front, sizes[0], s->tables, symbols, (int)s->order, freq)) return 0;
    fill_codes(p, code);
    rac_lookup(freq, s->tables, symbols, code, luts);
    const uint8_t *row, *col, *table = front + sizes[0] + sizes[1] + sizes[2];
    if (!classes(front + sizes[0], sizes[1], s->rows, p->row_classes, e, &row)) return 0;
    if (!classes(front + sizes[0] + sizes[1], sizes[2], s->cols, p->col_classes, e, &col)) return 0;
    for (int64_t i = 0; i < p->row_classes * p->col_classes; i++)
        if (table[i] >= s->tables) return 0;
    p->luts = luts;
    p->values = s->values;
    p->bases = s->bases;
    p->table = table;
    const int64_t last = size_of_unit(s->units, s->tiles), begin = up16(s->front);
    const rac_job all = {payload + begin, r->payload - begin - (up16(last) - last), row, col, r->out, s->rows, s->cols,
                         s->cols, p, 0, 0, 0};
    *span = (rac_span){all, s->units + 16, 0, s->tiles, s->tall, s->wide, r->word};
    return 1;
}

/* A record of a run: 1, or 0 where it is declined; -1 where the arena has too little. Under lanes/1 only its span is made */
static int enter(const rac_run *run, const rac_record *r, arena *a, expanded *e, rac_span *span) {
    rac_stated *s = hand_out(a, sizeof *s);
    uint8_t *copy = hand_out(a, r->head + 24);
    if (!s || !copy) return -1;
    if (!rac_head(run, r, copy, s) || !padded(run->data + s->payload, s)) return 0;
    if (r->coder == RAW) return raw(run, r, s);
    return r->coder == ZSTD ? sorted(run, r, s, e) : open_lanes(run, r, s, a, e, span);
}

/* Runs of tiles that are decoded together, and the number of the record of each */
typedef struct {
    rac_span *span;
    int64_t *of, n;
} group;

/* Decode them; where a tile is wrong, all of them are declined: the twin sees which */
static void decode(group *g, uint8_t *state) {
    int64_t wrong[2];
    if (g->n && rac_spans(g->span, g->n, wrong))
        for (int64_t k = 0; k < g->n; k++) state[g->of[k]] = 0;
    g->n = 0;
}

/* The tensors of records that `rac_heads` has left in `state`; those that are declined now become 0 there. What the frames of
 * record i hold begins at place[i] in `content`. `memory` is for tables, of several records where it suffices. */
int rac_records(const rac_record *record, int64_t n, const uint8_t *text, const uint8_t *data, int64_t size, int64_t tile,
                uint8_t *state, const int64_t *place, const uint8_t *content, int64_t held, uint8_t *memory, int64_t room) {
    const rac_run run = {record, text, data, size, tile};
    arena a = {memory, memory + room};
    group g = {malloc((size_t)n * sizeof *g.span + 1), malloc((size_t)n * sizeof *g.of + 1), 0};
    const int bad = !g.span || !g.of;
    for (int64_t i = 0; i < n && !bad; i++) {
        if (place[i] < 0 || place[i] > held) state[i] = 0;
        if (!state[i]) continue;
        expanded e = {content + place[i], content + held};
        int well = enter(&run, record + i, &a, &e, g.span + g.n);
        if (well < 0) { /* once more, with all of it */
            decode(&g, state);
            a.at = memory;
            e.at = content + place[i];
            well = enter(&run, record + i, &a, &e, g.span);
        }
        state[i] = well > 0;
        if (well > 0 && record[i].coder == LANES) g.of[g.n++] = i;
    }
    if (bad) memset(state, 0, (size_t)n);
    else decode(&g, state);
    free(g.span);
    free(g.of);
    return bad;
}
