/* Tiles of lanes/1 to words (stages/lanes.md, "Tile"), and on to the numbers that these stand for. Twin:
 * rac/stages/lanes. */
#include "tile.h"

enum { SYMBOLS_AT_ONCE = 16384, MOST_LANES = 1024 };

static int nonzero(const uint8_t *p, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (p[i]) return 1;
    return 0;
}

/* Stable counting sort: order[] of n things by class, ends[k] = first place of class k + 1. Four quarters at once, or
 * each waits for the counter that the one before has changed. */
static void by_class(const uint8_t *class, int64_t n, int k, int32_t *order, int64_t *ends) {
    int32_t next[4][256];
    const int64_t m = n / 4;
    for (int q = 0; q < 4; q++) memset(next[q], 0, (size_t)k * 4);
    for (int64_t i = 0; i < m; i++)
        for (int q = 0; q < 4; q++) next[q][class[q * m + i]]++;
    for (int64_t i = 4 * m; i < n; i++) next[3][class[i]]++;
    int32_t at = 0;
    for (int i = 0; i < k; i++) {
        ends[i] = at;
        for (int q = 0; q < 4; q++) {
            const int32_t here = next[q][i];
            next[q][i] = at;
            at += here;
        }
    }
    ends[k] = at;
    for (int64_t i = 0; i < m; i++)
        for (int q = 0; q < 4; q++) order[next[q][class[q * m + i]]++] = (int32_t)(q * m + i);
    for (int64_t i = 4 * m; i < n; i++) order[next[3][class[i]]++] = (int32_t)i;
}

/* The classes of k that occur; returns how many: a tile is not charged for others */
static int occurring(const int64_t *ends, int k, int *classes) {
    int n = 0;
    for (int i = 0; i < k; i++)
        if (ends[i] < ends[i + 1]) classes[n++] = i;
    return n;
}

/* The blocks of a tile whose rows and columns are sorted, by table */
static void cut_blocks(rac_tile *w) {
    const rac_shared *s = w->shared;
    int rows[256], cols[256];
    const int nr = occurring(w->row_end, s->row_classes, rows);
    const int kc = s->col_classes, nc = occurring(w->col_end, kc, cols);
    const int64_t *re = w->row_end, *ce = w->col_end;
    int32_t first[256];
    int most = 0, at = 0;
    for (int r = 0; r < nr; r++)
        for (int c = 0; c < nc; c++) {
            const int table = s->table[rows[r] * kc + cols[c]];
            for (; most <= table; most++) first[most] = 0; /* small tiles are many, and tables few */
            first[table]++;
        }
    for (int i = 0; i < most; i++) {
        const int here = first[i];
        first[i] = at;
        at += here;
    }
    w->last = w->blocks + at;
    for (int r = 0; r < nr; r++)
        for (int c = 0; c < nc; c++) {
            const int i = rows[r], k = cols[c], table = s->table[i * kc + k];
            w->blocks[first[table]++] = (rac_block){table, re[i], re[i + 1], ce[k], ce[k + 1]};
        }
}

/* Memory for a tile, which the next one takes over: fresh memory costs as much as what is done in it */
typedef struct { char *at; size_t size; } space;

/* `n` bytes, which hold nothing yet; null where there are none */
static void *room(space *s, size_t n) {
    if (n >= s->size) {
        free(s->at);
        s->size = n + n / 8 + 64;
        if (!(s->at = malloc(s->size))) s->size = 0;
    }
    return s->at;
}

/* A tile before it is decoded: its rows and columns by class, its blocks; coded symbols are to lie at *sym, which may
 * be null */
static int prepare(rac_tile *w, const rac_job *job, space *own, uint8_t **sym) {
    const rac_shared *s = w->shared = job->shared;
    const int kr = s->row_classes, kc = s->col_classes;
    const int64_t h = job->rows, c = job->cols;
    w->job = job;
    w->seq = w->coded = 0;
    const size_t blocks = (size_t)least(kr * kc, h * c), lists = (size_t)(h + c) * 4; /* at most */
    /* each segment may end in half a pair */
    const size_t symbols = sym ? (size_t)(h * c / s->per) + blocks + 1024 : 0;
    char *at = room(own, blocks * sizeof(rac_block) + lists + symbols);
    if (!at) return NO_MEMORY;
    w->blocks = (rac_block *)at;
    w->row = (int32_t *)(at + blocks * sizeof(rac_block));
    w->col = w->row + h;
    if (sym) *sym = (uint8_t *)(w->col + c);
    w->row_end[0] = w->col_end[0] = 0;
    w->row_end[1] = h;
    w->col_end[1] = c;
    if (kr > 1) by_class(job->row_class, h, kr, w->row, w->row_end);
    else w->row = 0;
    if (kc > 1) by_class(job->col_class, c, kc, w->col, w->col_end);
    else w->col = 0;
    cut_blocks(w);
    return 0;
}

/* Where the words of a tile go: straight to their places, or first to memory that its symbols need not have */
static int seat(rac_tile *w, space *shared) {
    const rac_job *job = w->job;
    const int64_t n = job->rows * job->cols;
    const int unsort = w->col && rac_has_unsort(w->shared->word);
    const int64_t coded = job->numbers ? up16(n) + up16(2 * (job->cols + 63)) : 0; /* and the states of the trellis */
    const int64_t seq = unsort ? up16((n + 64) * w->shared->word) : 0;
    char *at = room(shared, (size_t)(coded + seq) + rac_unsort_room(job));
    if (!at) return NO_MEMORY;
    if (unsort) w->seq = at + coded;
    w->dst = job->dst;
    w->stride = job->stride;
    if (job->numbers) {
        w->dst = w->coded = (uint8_t *)at;
        w->stride = job->cols;
    }
    w->room = at + coded + seq;
    rac_choose(w);
    return 0;
}

/* Where the streams of a tile unit are, and the numbers of words of its lanes */
static int find_streams(rac_tile *w, uint32_t *left) {
    const rac_job *job = w->job;
    const rac_shared *s = w->shared;
    const int64_t lanes = s->lanes, n = job->rows * job->cols;
    const int64_t directory = 4 + s->skip + 2 * lanes; /* `skip` bytes hold what the caller has seen to */
    const uint8_t *u = job->unit;
    const int64_t first = up16(directory);
    if (job->size < first) return BAD_FILL;
    uint32_t nw = 0, ne;
    memcpy(&ne, u, 4);
    for (int64_t l = 0; l < lanes; l++) {
        uint16_t c;
        memcpy(&c, u + 4 + s->skip + 2 * l, 2);
        nw += left[l] = c;
    }
    const int64_t esc = first + up16(4 * (int64_t)nw), words_end = first + 4 * (int64_t)nw;
    int64_t at = esc + up16(ne);
    if (at > job->size) return BAD_FILL;
    int bad = nonzero(u + directory, first - directory) | nonzero(u + words_end, esc - words_end) |
              nonzero(u + esc + ne, at - esc - ne);
    w->words = (const uint32_t *)(u + first);
    w->end = w->words + (job->size - first) / 4;
    w->escape = u + esc;
    w->escapes = ne;
    w->used = 0;
    w->planes = u;
    int k = 0;
    for (int b = 32; b; b >>= 1) {
        if (!(s->raw & b)) continue;
        const int64_t size = (n * b + 7) / 8;
        if (at + up16(size) > job->size) return BAD_FILL;
        w->start[k++] = at;
        bad |= nonzero(u + at + size, up16(size) - size);
        if (b < 8 && n * b % 8 && u[at + size - 1] >> (n * b % 8)) return BAD_PLANE;
        at += up16(size);
    }
    if (at != job->size) return BAD_FILL;
    return bad ? BAD_PADDING : 0;
}

/* The head of a tile unit, and the states that its lanes begin in */
static int begin(rac_tile *w, uint64_t *st, uint32_t *left) {
    const int bad = find_streams(w, left);
    if (bad) return bad;
    for (int64_t l = 0; l < w->shared->lanes; l++) {
        st[l] = 0;
        if (!left[l]) continue;
        st[l] = *w->words++;
        if (!st[l]) return BAD_WORD;
        if (--left[l]) {
            st[l] = st[l] << 32 | *w->words++;
            left[l]--;
        }
    }
    return 0;
}

/* Whether all of it was used up */
static int ended(const rac_tile *w, const uint64_t *st, const uint32_t *left) {
    for (int64_t l = 0; l < w->shared->lanes; l++)
        if (st[l] || left[l]) return BAD_STATE;
    return w->used == w->escapes ? 0 : BAD_ESCAPES;
}

/* Elements of the segment that begins with block *b, which goes to the next */
static int64_t segment(const rac_tile *w, const rac_block **b) {
    int64_t total = 0;
    for (const int64_t table = (*b)->table; *b < w->last && (*b)->table == table; ++*b)
        total += ((*b)->r1 - (*b)->r0) * ((*b)->c1 - (*b)->c0);
    return total;
}

static int decode(rac_tile *w) {
    const rac_shared *s = w->shared;
    uint64_t st[MOST_LANES];
    uint32_t left[MOST_LANES];
    uint8_t sym[SYMBOLS_AT_ONCE + MOST_LANES];
    int bad = begin(w, st, left);
    if (bad) return bad;
    const int64_t per = s->per, whole = SYMBOLS_AT_ONCE / s->lanes * s->lanes;
    rac_cursor at = {w->blocks, 0, 0};
    rac_lanes t = {.st = st, .left = left, .words = w->words, .end = w->end};
    for (const rac_block *b = w->blocks; b < w->last;) {
        t.lut = s->luts + 4096 * b->table;
        const int64_t total = segment(w, &b), coded = (total + per - 1) / per;
        for (int64_t k = 0, got; k < coded; k += got) {
            got = least(coded - k, whole);
            t.out = sym;
            rac_rows(&t, got, s->lanes);
            if ((bad = rac_emit(w, sym, least(got * per, total - k * per), &at))) return bad;
        }
    }
    return ended(w, st, left);
}

/* What was decoded to its places, and on to the numbers that it stands for */
static void finish(rac_tile *w) {
    const rac_job *j = w->job;
    if (w->seq) rac_unsort(w);
    if (!w->coded) return;
    const rac_matrix words = {w->coded, j->rows, j->cols, j->cols}, dst = {j->dst, j->rows, j->cols, j->stride};
    rac_untrellis(&words, j->numbers, j->col, j->row, &dst, (uint16_t *)(w->coded + up16(j->rows * j->cols)));
}

/* Memory of a call: for each of the tiles that are decoded side by side, and for the one whose words are put */
typedef struct { space own[SIDE_BY_SIDE], words; } desk;

static int tile(const rac_job *job, desk *d) {
    rac_tile w;
    int bad = prepare(&w, job, d->own, 0);
    if (!bad) bad = seat(&w, &d->words);
    if (!bad) bad = decode(&w);
    if (!bad) finish(&w);
    return bad;
}

/* A tile among others */
typedef struct {
    rac_lanes lanes;
    uint64_t st[FEW];
    uint32_t left[FEW];
    rac_tile w;
    space *own;
    uint8_t *sym;           /* all coded symbols of the tile */
    const rac_block *block; /* of the next segment */
    int64_t number;
} slot;

/* The next segment of a tile; 0 where there is none */
static int next(slot *s) {
    const rac_shared *shared = s->w.shared;
    if (s->block == s->w.last) return 0;
    s->lanes.lut = shared->luts + 4096 * s->block->table;
    s->lanes.rest = (segment(&s->w, &s->block) + shared->per - 1) / shared->per;
    return 1;
}

static int enter(slot *s, const rac_job *job, int64_t number) {
    s->number = number;
    int bad = prepare(&s->w, job, s->own, &s->sym);
    if (bad) return bad;
    s->lanes.out = s->sym;
    s->block = s->w.blocks;
    s->lanes.st = s->st;
    s->lanes.left = s->left;
    if ((bad = begin(&s->w, s->st, s->left))) return bad;
    s->lanes.words = s->w.words;
    s->lanes.end = s->w.end;
    next(s);
    return 0;
}

static int leave(slot *s, space *words) {
    rac_tile *w = &s->w;
    int bad = seat(w, words);
    if (bad) return bad;
    const int64_t per = w->shared->per;
    rac_cursor at = {w->blocks, 0, 0};
    const uint8_t *sym = s->sym;
    for (const rac_block *b = w->blocks; b < w->last;) {
        const int64_t total = segment(w, &b);
        if ((bad = rac_emit(w, sym, total, &at))) return bad;
        sym += (total + per - 1) / per;
    }
    if (!(bad = ended(w, s->st, s->left))) finish(w);
    return bad;
}

/* The tiles *from.. below n that have as many lanes as the first of them, `most` at once: one alone leaves the
 * processor waiting for the step before. *from becomes the next tile, *at one that is wrong. */
static int abreast(const rac_job *job, int64_t *from, int64_t n, int most, int64_t *at, desk *d) {
    const int64_t lanes = job[*from].shared->lanes;
    slot *slots = malloc((size_t)most * sizeof *slots);
    rac_lanes *all[SIDE_BY_SIDE];
    int active = 0, bad = slots ? 0 : NO_MEMORY;
    for (int k = 0; !bad && k < most; k++) {
        all[k] = &slots[k].lanes;
        slots[k].own = d->own + k;
    }
    while (!bad) {
        while (active < most && *from < n && job[*from].shared->lanes == lanes && !bad) {
            *at = *from;
            bad = enter((slot *)all[active++], job + *from, *from);
            ++*from;
        }
        if (!active || bad) break;
        rac_side_by_side(all, active, lanes);
        for (int k = 0; k < active && !bad;) {
            slot *s = (slot *)all[k];
            if (s->lanes.rest || next(s)) {
                k++;
                continue;
            }
            *at = s->number;
            bad = leave(s, &d->words);
            all[k] = all[--active];
            all[active] = &s->lanes;
        }
    }
    free(slots);
    return bad;
}

/* Desks that no call uses, so that the next call has memory that was used before: few and small ones */
enum { DESKS = 8, MOST_KEPT = 16 << 20 };
static desk *idle[DESKS];

static desk *take_desk(void) {
    for (int k = 0; k < DESKS; k++) {
        desk *d = __atomic_exchange_n(idle + k, (desk *)0, __ATOMIC_ACQUIRE);
        if (d) return d;
    }
    return calloc(1, sizeof(desk));
}

static void give_desk(desk *d) {
    size_t size = d->words.size;
    for (int k = 0; k < SIDE_BY_SIDE; k++) size += d->own[k].size;
    for (int k = 0; size <= MOST_KEPT && d && k < DESKS; k++) {
        desk *none = 0;
        if (__atomic_compare_exchange_n(idle + k, &none, d, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) d = 0;
    }
    if (!d) return;
    for (int k = 0; k < SIDE_BY_SIDE; k++) free(d->own[k].at);
    free(d->words.at);
    free(d);
}

/* The n tiles; the number of one that is wrong in *at. 0 or what is wrong */
int rac_tiles(const rac_job *job, int64_t n, int64_t *at) {
    desk *d = take_desk();
    int bad = d ? 0 : NO_MEMORY;
    for (int64_t i = *at = 0; i < n && !bad;) {
        const int most = rac_abreast(job[i].shared->lanes);
        if (most > 1) bad = abreast(job, &i, n, most, at, d);
        else bad = tile(job + (*at = i++), d);
    }
    if (d) give_desk(d);
    return bad;
}
