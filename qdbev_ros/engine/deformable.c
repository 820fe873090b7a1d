/* SPDX-License-Identifier: Apache-2.0 */
/* Deformable attention for CPUs: weighted sums of bilinear samples, zeros outside the maps. Built by native.py.
 *
 * value (B, S, heads, depth): the levels' maps one after the other, row-major, of `sizes` (height, width). Two ways in:
 * - qdbev_deformable: places and weights as they are.
 * - qdbev_attend: what the linear layers of an attention put out, and what becomes of its samples, in one pass.
 *
 * A sample reads four runs of `depth` numbers that lie side by side, and the sum stays in registers: GridSample wants the
 * maps with channels outermost, writes every sample out and weights it in a second pass. Where the samples of a row are
 * and what their corners count is found for all of them at once, in loops that compilers turn into vectors.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MOST_DEPTH 256
#define MOST_SAMPLES 1024 /* of a row: heads x levels x points */

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef struct {
    int64_t tokens, queries, heads, depth, levels, points; /* queries: rows that read the same maps */
    int64_t raw_rows, maps, pillar, most;                  /* qdbev_attend's own, see there */
} Shape;

/* What a row's samples have in common with those of any other: for each, its map and where that begins. */
typedef struct {
    int32_t width[MOST_SAMPLES], height[MOST_SAMPLES], start[MOST_SAMPLES];
} Maps;

/* The samples of a row: pixels of their maps and weights; then how much each of four corners counts, and where it is. */
typedef struct {
    float x[MOST_SAMPLES], y[MOST_SAMPLES], weight[MOST_SAMPLES];
    float share[4][MOST_SAMPLES];
    int32_t at[4][MOST_SAMPLES];
} Samples;

static void fill_maps(const Shape *s, const int32_t *sizes, Maps *maps)
{
    const int32_t stride = (int32_t)(s->heads * s->depth);
    int32_t *width = maps->width, *height = maps->height, *start = maps->start;
    for (int64_t head = 0; head < s->heads; head++) {
        int32_t token = 0;
        for (int64_t level = 0; level < s->levels; level++) {
            for (int64_t point = 0; point < s->points; point++) {
                *height++ = sizes[2 * level];
                *width++ = sizes[2 * level + 1];
                *start++ = token * stride + (int32_t)(head * s->depth);
            }
            token += sizes[2 * level] * sizes[2 * level + 1];
        }
    }
}

static void find_corners(const Maps *restrict maps, int count, int32_t stride, Samples *restrict s)
{
    for (int i = 0; i < count; i++) {
        const int32_t width = maps->width[i], height = maps->height[i];
        /* Also turns away what is no number. */
        const float any_x = s->x[i], any_y = s->y[i], any_weight = s->weight[i];
        const int inside = (any_x > -1.0f) & (any_y > -1.0f) & (any_x < (float)width) & (any_y < (float)height);
        /* A weight that is no number stays none, wherever its sample is. */
        const float x = inside ? any_x : 0.0f, y = inside ? any_y : 0.0f, weight = any_weight * (inside ? 1.0f : 0.0f);
        const float left = floorf(x), top = floorf(y);
        const int32_t x0 = (int32_t)left, y0 = (int32_t)top, x1 = x0 + 1, y1 = y0 + 1;
        /* Corners outside count nothing; they read the pixel beside them. */
        const float a = x0 < 0 ? 0.0f : 1.0f - (x - left), b = x1 < width ? x - left : 0.0f;
        const float c = y0 < 0 ? 0.0f : 1.0f - (y - top), d = y1 < height ? y - top : 0.0f;
        const int32_t west = x0 < 0 ? 0 : x0, east = x1 < width ? x1 : width - 1;
        const int32_t upper = (y0 < 0 ? 0 : y0) * width, lower = (y1 < height ? y1 : height - 1) * width;
        s->weight[i] = weight;
        s->share[0][i] = a * c * weight;
        s->share[1][i] = b * c * weight;
        s->share[2][i] = a * d * weight;
        s->share[3][i] = b * d * weight;
        s->at[0][i] = (upper + west) * stride + maps->start[i];
        s->at[1][i] = (upper + east) * stride + maps->start[i];
        s->at[2][i] = (lower + west) * stride + maps->start[i];
        s->at[3][i] = (lower + east) * stride + maps->start[i];
    }
}

/* Adds the samples of a row to out (heads, depth). */
INLINE void add_samples(const Samples *s, int heads, int each, int depth, const float *value, float *out)
{
    for (int head = 0, i = 0; head < heads; head++, out += depth) {
        float sum[MOST_DEPTH];
        for (int k = 0; k < depth; k++)
            sum[k] = out[k];
        for (int end = i + each; i < end; i++) {
            if (s->weight[i] == 0.0f)
                continue;
            const float a = s->share[0][i], b = s->share[1][i], c = s->share[2][i], d = s->share[3][i];
            const float *pa = value + s->at[0][i], *pb = value + s->at[1][i];
            const float *pc = value + s->at[2][i], *pd = value + s->at[3][i];
            for (int k = 0; k < depth; k++)
                sum[k] += a * pa[k] + b * pb[k] + c * pc[k] + d * pd[k];
        }
        for (int k = 0; k < depth; k++)
            out[k] = sum[k];
    }
}

/* Depths that are known when compiling stay in registers. */
static void add_row(const Shape *s, const Samples *samples, const float *value, float *out)
{
    const int heads = (int)s->heads, each = (int)(s->levels * s->points);
    switch (s->depth) {
    case 16: add_samples(samples, heads, each, 16, value, out); break;
    case 32: add_samples(samples, heads, each, 32, value, out); break;
    default: add_samples(samples, heads, each, (int)s->depth, value, out);
    }
}

/* locations (B, queries, heads, levels, points, 2): (x, y), 0..1 over the map; weights (B, queries, heads, levels, points);
 * out (B, queries, heads, depth). Works on the rows first <= b * queries + q < last, so that threads can share the work. */
void qdbev_deformable(const Shape *s, const int32_t *sizes, const float *value, const float *locations,
                      const float *weights, float *out, int64_t first, int64_t last)
{
    const int64_t stride = s->heads * s->depth, count = s->heads * s->levels * s->points;
    Maps maps;
    Samples samples;
    fill_maps(s, sizes, &maps);
    for (int64_t row = first; row < last; row++) {
        for (int64_t i = 0; i < count; i++) {
            samples.x[i] = locations[(row * count + i) * 2] * (float)maps.width[i] - 0.5f;
            samples.y[i] = locations[(row * count + i) * 2 + 1] * (float)maps.height[i] - 0.5f;
            samples.weight[i] = weights[row * count + i];
        }
        find_corners(&maps, (int)count, (int32_t)stride, &samples);
        memset(out + row * stride, 0, stride * sizeof(float));
        add_row(s, &samples, value + row / s->queries * s->tokens * stride, out + row * stride);
    }
}

/* e^x for x <= 0, within two units of the last place: a power of two times a polynomial on half a one around. */
INLINE float exponential(float x)
{
    /* What is no number passes the first line, and so on to the result, but has no power of two. */
    x = x < -87.0f ? -87.0f : x;
    const float n = rintf((x > -87.0f ? x : -87.0f) * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* The samples of a row as the linear layers say it: where, in pixels around the row's references, and how much, by a
 * softmax over the samples of each head, times `share`. `each`: samples of a head. */
static void place_samples(const Shape *s, const Maps *maps, const float *offsets, const float *logits,
                          const float *references, float share, Samples *to)
{
    const int each = (int)(s->levels * s->points), points = (int)s->points, pillar = (int)s->pillar;
    float x[MOST_SAMPLES], y[MOST_SAMPLES];
    for (int i = 0; i < each; i++) {
        const float *reference = references + i % points % pillar * 2;
        x[i] = reference[0] * (float)maps->width[i] - 0.5f;
        y[i] = reference[1] * (float)maps->height[i] - 0.5f;
    }
    const int count = (int)s->heads * each;
    for (int i = 0; i < count; i += each, offsets += s->maps * each * 2, logits += s->maps * each) {
        float most = logits[0];
        for (int k = 1; k < each; k++)
            most = logits[k] > most ? logits[k] : most;
        for (int k = 0; k < each; k++) {
            to->x[i + k] = x[k] + offsets[2 * k];
            to->y[i + k] = y[k] + offsets[2 * k + 1];
            to->weight[i + k] = logits[k] - most;
        }
    }
    for (int i = 0; i < count; i++)
        to->weight[i] = exponential(to->weight[i]);
    for (int i = 0; i < count; i += each) {
        float sum = 0.0f;
        for (int k = 0; k < each; k++)
            sum += to->weight[i + k];
        for (int k = 0; k < each; k++)
            to->weight[i + k] *= share / sum;
    }
}

/* offsets (raw_rows, heads, maps, levels, points, 2) in pixels, x first; logits (raw_rows, heads, maps, levels, points).
 * A row is a raw row on one of the `maps`, all of the first one's before those of the second; there are maps x raw_rows.
 * references (rows, pillar, 2): places, 0..1 over the map; point i has that of i mod pillar. out (outputs, heads, depth):
 * each is made of `most` rows times their shares, slots and shares (outputs, most); a slot that is no row adds nothing.
 * Without slots it is the mean of its raw row's on all maps. Works on the outputs first <= o < last. */
void qdbev_attend(const Shape *s, const int32_t *sizes, const float *value, const float *offsets, const float *logits,
                  const float *references, const int64_t *slots, const float *shares, float *out, int64_t first,
                  int64_t last)
{
    const int64_t stride = s->heads * s->depth, count = s->heads * s->levels * s->points;
    const int64_t each = s->levels * s->points, rows = s->maps * s->raw_rows;
    Maps maps;
    Samples samples;
    fill_maps(s, sizes, &maps);
    for (int64_t output = first; output < last; output++) {
        memset(out + output * stride, 0, stride * sizeof(float));
        for (int64_t k = 0; k < s->most; k++) {
            const int64_t row = slots ? slots[output * s->most + k] : output + k * s->raw_rows;
            const float share = slots ? shares[output * s->most + k] : 1.0f / (float)s->most;
            if (row < 0 || row >= rows || share == 0.0f)
                continue;
            const int64_t raw = row % s->raw_rows, map = row / s->raw_rows;
            place_samples(s, &maps, offsets + (raw * s->maps * count + map * each) * 2,
                          logits + raw * s->maps * count + map * each, references + row * s->pillar * 2, share, &samples);
            find_corners(&maps, (int)count, (int32_t)stride, &samples);
            add_row(s, &samples, value + row / s->queries * s->tokens * stride, out + output * stride);
        }
    }
}
