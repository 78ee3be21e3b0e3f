/* k-means of pairs of numbers whose two coordinates are weighed differently in each pair, for GPTVQ. */
#include <float.h>
#include <stdint.h>
#include <stdlib.h>

/* The nearest of k centres (2, k) to each of n pairs (n, 2) with weights (n, 2); k is a multiple of 16. */
void nearest(const float *pairs, const float *weights, long n, int k, const float *centres, int32_t *which)
{
    for (long i = 0; i < n; i++) {
        const float x = pairs[2 * i], y = pairs[2 * i + 1], u = weights[2 * i], v = weights[2 * i + 1];
        float cost[1024];
        for (int c = 0; c < k; c++) {
            const float p = x - centres[c], q = y - centres[k + c];
            cost[c] = u * p * p + v * q * q;
        }
        float least = FLT_MAX;
        for (int c = 0; c < k; c++) least = cost[c] < least ? cost[c] : least;
        int at = 0;
        while (at < k - 1 && cost[at] != least) at++;
        which[i] = at;
    }
}

/* Lloyd's iterations on the centres; those of no pair stay where they are. -1: no memory. */
int means(const float *pairs, const float *weights, long n, int k, int times, float *centres)
{
    int32_t *which = malloc(sizeof(int32_t) * (size_t)n);
    double *sums = malloc(sizeof(double) * 4 * (size_t)k);
    const int ok = which && sums;
    for (int time = 0; ok && time < times; time++) {
        nearest(pairs, weights, n, k, centres, which);
        for (int c = 0; c < 4 * k; c++) sums[c] = 0;
        for (long i = 0; i < n; i++)
            for (int d = 0; d < 2; d++) {
                sums[4 * which[i] + 2 * d] += (double)weights[2 * i + d] * pairs[2 * i + d];
                sums[4 * which[i] + 2 * d + 1] += weights[2 * i + d];
            }
        for (int c = 0; c < k; c++)
            for (int d = 0; d < 2; d++)
                if (sums[4 * c + 2 * d + 1] > 0) centres[d * k + c] = (float)(sums[4 * c + 2 * d] / sums[4 * c + 2 * d + 1]);
    }
    free(which), free(sums);
    return ok ? 0 : -1;
}
