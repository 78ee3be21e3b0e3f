/* Weights for products (coded.c), and the threads that make them */
#pragma once
#include "rac.h"

enum { EXACT, ROUNDED, WORDS }; /* kinds: codes of float32 weights, codes of BF16 weights, BF16 words */

/* A weight (out, in) */
typedef struct {
    const void *codes;           /* (out, in) int8, or words */
    const float *rows, *columns; /* scales (out), (in); none of words */
    const int64_t *places;       /* (apart, 2) row and column of numbers beside the codes, by row */
    const float *values;         /* (apart) */
    int64_t out, in, apart, kind;
} rac_coded;

/* What threads share; zeros at first, and 64 bytes apart what one writes while another reads */
typedef struct {
    uint64_t open; /* number of the product, pieces that nobody has begun: 32 bits each */
    char apart1[56];
    int64_t left; /* pieces that are not done */
    char apart2[56];
    const void *task;
    void (*parallel)(void (*run)(void *), void *with, unsigned threads, unsigned); /* as GOMP_parallel; or none */
    int64_t threads; /* that the pieces of a product are for */
    int busy;        /* whether a thread has a product here */
} rac_team;
