/* SPDX-License-Identifier: Apache-2.0 */
/* Deformable sampling for CPUs: weighted sums of bilinear samples, zeros outside the maps. Built by native.py.
 *
 * value (B, S, heads, depth): the levels' maps one after the other, row-major, of `sizes` (height, width)
 * locations (B, Q, heads, levels, points, 2): (x, y), 0..1 over the map; weights (B, Q, heads, levels, points)
 * out (B, Q, heads, depth). Works on the rows first <= b * Q + q < last, so that threads can share the work.
 *
 * A sample reads four runs of `depth` numbers that lie side by side, and the sum stays in registers: GridSample wants the
 * maps with channels outermost, writes every sample out and weights it in a second pass.
 */
#include <math.h>
#include <stdint.h>

#define MOST_DEPTH 256

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef struct {
    int64_t tokens, queries, heads, depth, levels, points;
} Shape;

/* Adds one sample of a map (height, width, stride numbers a pixel) to sum. */
INLINE void add_sample(const float *map, int height, int width, int64_t stride, int depth, float x, float y,
                       float weight, float *sum)
{
    x = x * (float)width - 0.5f;
    y = y * (float)height - 0.5f;
    /* Also turns away what is no number. */
    if (!(x > -1.0f && y > -1.0f && x < (float)width && y < (float)height))
        return;
    const float left = floorf(x), top = floorf(y);
    const float right_share = x - left, low_share = y - top;
    int x0 = (int)left, y0 = (int)top, x1 = x0 + 1, y1 = y0 + 1;
    float a = (1.0f - right_share) * (1.0f - low_share) * weight, b = right_share * (1.0f - low_share) * weight;
    float c = (1.0f - right_share) * low_share * weight, d = right_share * low_share * weight;
    /* Corners outside count nothing; they read the pixel beside them. */
    if (x0 < 0) { x0 = 0; a = c = 0.0f; }
    if (y0 < 0) { y0 = 0; a = b = 0.0f; }
    if (x1 >= width) { x1 = width - 1; b = d = 0.0f; }
    if (y1 >= height) { y1 = height - 1; c = d = 0.0f; }
    const float *upper = map + (int64_t)y0 * width * stride, *lower = map + (int64_t)y1 * width * stride;
    const float *pa = upper + x0 * stride, *pb = upper + x1 * stride;
    const float *pc = lower + x0 * stride, *pd = lower + x1 * stride;
    for (int i = 0; i < depth; i++)
        sum[i] += a * pa[i] + b * pb[i] + c * pc[i] + d * pd[i];
}

INLINE void sample_rows(const Shape *s, int depth, const int32_t *sizes, const float *value, const float *locations,
                        const float *weights, float *out, int64_t first, int64_t last)
{
    const int64_t stride = s->heads * depth, samples = s->levels * s->points;
    for (int64_t row = first; row < last; row++) {
        const float *maps = value + row / s->queries * s->tokens * stride;
        for (int64_t head = 0; head < s->heads; head++) {
            const float *place = locations + (row * s->heads + head) * samples * 2;
            const float *weight = weights + (row * s->heads + head) * samples;
            const float *map = maps + head * depth;
            float sum[MOST_DEPTH];
            for (int i = 0; i < depth; i++)
                sum[i] = 0.0f;
            for (int64_t level = 0; level < s->levels; level++) {
                const int height = sizes[2 * level], width = sizes[2 * level + 1];
                for (int64_t point = 0; point < s->points; point++, place += 2)
                    add_sample(map, height, width, stride, depth, place[0], place[1], *weight++, sum);
                map += (int64_t)height * width * stride;
            }
            float *result = out + (row * s->heads + head) * depth;
            for (int i = 0; i < depth; i++)
                result[i] = sum[i];
        }
    }
}

/* Depths that are known when compiling stay in registers. */
void qdbev_deformable(const Shape *s, const int32_t *sizes, const float *value, const float *locations,
                      const float *weights, float *out, int64_t first, int64_t last)
{
    switch (s->depth) {
    case 16: sample_rows(s, 16, sizes, value, locations, weights, out, first, last); break;
    case 32: sample_rows(s, 32, sizes, value, locations, weights, out, first, last); break;
    default: sample_rows(s, (int)s->depth, sizes, value, locations, weights, out, first, last);
    }
}
