/* SPDX-License-Identifier: Apache-2.0 */
/* 3x3 convolutions of 4-bit weights and 6-bit activations by Winograd's F(2x2, 3x3), exact in int8. Built by native.py.
 *
 * Four outputs side by side take 16 products a channel instead of 36: y = A' [(G w G') . (B' d B)] A. B adds and
 * subtracts four codes, which makes 8 bits of 6; 2G at most nine weights, which makes 7 bits of 4: both fit the
 * processor's product of unsigned and signed bytes, sums are 32 bits, and the factor of 4 divides without a rest. So
 * the sums are those of the plain convolution to the last bit, which networks of 8 bits cannot have.
 *
 * x (images, height, width, inputs) uint8 codes; weights (outputs / 64, 16, inputs / 4, 64, 4) int8: 2G w 2G', packed by
 * winograd.py; out (images, height, width, outputs) uint8. Stride 1, padding 1; inputs and outputs divide by 64.
 */
#include <stdint.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#define LANES 64 /* outputs of a pass */
#define ROWS 6   /* tiles whose sums stay in registers: 6 x 64 of them are 24 of the 32 */
#define BLOCK 48 /* tiles of a pass; transformed pictures and sums of a block stay in the second cache */
#define SPOTS 16 /* of a transformed tile */

typedef struct {
    int64_t images, height, width, inputs, outputs;
    int32_t zero, plain_sum; /* code that stands for 0; spot 5, the sum of four codes, needs no offset */
    int32_t out_zero, low, high; /* the result's code for 0, its lowest and highest code */
} Shape;

int qdbev_winograd_runs(void) { return 1; }

/* Bytes that a thread needs beside its arguments. */
int64_t qdbev_winograd_scratch(const Shape *s)
{
    return SPOTS * BLOCK * s->inputs + (int64_t)SPOTS * BLOCK * LANES * sizeof(int32_t) + 64;
}

/* B' d B of one tile, 64 channels at once. Sums of codes are kept modulo 256, in which they fit once 128 is added. */
static void transform_tile(const Shape *s, const uint8_t *image, int64_t top, int64_t left, int64_t channel,
                           uint8_t *to, int64_t spot_stride)
{
    __m512i d[4][4], r[4][4];
    const __m512i zero = _mm512_set1_epi8((char)s->zero), half = _mm512_set1_epi8((char)128);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            const int64_t y = top + i, x = left + j;
            const int inside = y >= 0 && y < s->height && x >= 0 && x < s->width;
            d[i][j] = inside ? _mm512_loadu_si512(image + (y * s->width + x) * s->inputs + channel) : zero;
        }
    for (int j = 0; j < 4; j++) {
        r[0][j] = _mm512_sub_epi8(d[0][j], d[2][j]);
        r[1][j] = _mm512_add_epi8(d[1][j], d[2][j]);
        r[2][j] = _mm512_sub_epi8(d[2][j], d[1][j]);
        r[3][j] = _mm512_sub_epi8(d[1][j], d[3][j]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i v[4] = {_mm512_sub_epi8(r[i][0], r[i][2]), _mm512_add_epi8(r[i][1], r[i][2]),
                              _mm512_sub_epi8(r[i][2], r[i][1]), _mm512_sub_epi8(r[i][1], r[i][3])};
        for (int j = 0; j < 4; j++) {
            const int plain = i == 1 && j == 1 && s->plain_sum;
            _mm512_storeu_si512(to + (4 * i + j) * spot_stride, plain ? v[j] : _mm512_add_epi8(v[j], half));
        }
    }
}

/* Sums of ROWS tiles and LANES outputs at one spot: (ROWS, inputs) x (inputs / 4, LANES, 4). The 24 sums have names of
 * their own, because compilers keep an array of them on the stack. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(i) __m512i a##i = begin[0], b##i = begin[1], c##i = begin[2], d##i = begin[3];
#define ADD(i)                                                                            \
    {                                                                                     \
        const __m512i four = _mm512_set1_epi32(*(const int32_t *)(tiles + i * inputs + k)); \
        a##i = _mm512_dpbusd_epi32(a##i, four, w0);                                       \
        b##i = _mm512_dpbusd_epi32(b##i, four, w1);                                       \
        c##i = _mm512_dpbusd_epi32(c##i, four, w2);                                       \
        d##i = _mm512_dpbusd_epi32(d##i, four, w3);                                       \
    }
#define STORE(i)                                          \
    _mm512_storeu_si512(sums + i * LANES, a##i);      \
    _mm512_storeu_si512(sums + i * LANES + 16, b##i); \
    _mm512_storeu_si512(sums + i * LANES + 32, c##i); \
    _mm512_storeu_si512(sums + i * LANES + 48, d##i);

static void multiply(const uint8_t *tiles, const int8_t *weights, const int32_t *start, int64_t inputs, int32_t *sums)
{
    const __m512i begin[4] = {_mm512_loadu_si512(start), _mm512_loadu_si512(start + 16),
                              _mm512_loadu_si512(start + 32), _mm512_loadu_si512(start + 48)};
    EACH_ROW(BEGIN)
    for (int64_t k = 0; k < inputs; k += 4, weights += 4 * LANES) {
        const __m512i w0 = _mm512_loadu_si512(weights), w1 = _mm512_loadu_si512(weights + 64);
        const __m512i w2 = _mm512_loadu_si512(weights + 128), w3 = _mm512_loadu_si512(weights + 192);
        EACH_ROW(ADD)
    }
    EACH_ROW(STORE)
}

/* A' m A of one tile, 16 outputs at once, and the codes of the result. */
static void finish_tile(const Shape *s, const int32_t *sums, int64_t spot_stride, const int32_t *bias,
                        const float *factors, uint8_t *out, int rows, int columns)
{
    const __m512 low = _mm512_set1_ps((float)(s->low - s->out_zero)), high = _mm512_set1_ps((float)(s->high - s->out_zero));
    const __m512i zero = _mm512_set1_epi32(s->out_zero);
    for (int lane = 0; lane < LANES; lane += 16) {
        __m512i t[2][4], y[2][2];
        for (int j = 0; j < 4; j++) {
            const int32_t *m = sums + j * spot_stride + lane;
            const __m512i a = _mm512_loadu_si512(m), b = _mm512_loadu_si512(m + 4 * spot_stride);
            const __m512i c = _mm512_loadu_si512(m + 8 * spot_stride), d = _mm512_loadu_si512(m + 12 * spot_stride);
            t[0][j] = _mm512_add_epi32(_mm512_add_epi32(a, b), c);
            t[1][j] = _mm512_sub_epi32(_mm512_sub_epi32(b, c), d);
        }
        for (int i = 0; i < 2; i++) {
            y[i][0] = _mm512_add_epi32(_mm512_add_epi32(t[i][0], t[i][1]), t[i][2]);
            y[i][1] = _mm512_sub_epi32(_mm512_sub_epi32(t[i][1], t[i][2]), t[i][3]);
        }
        const __m512i b = _mm512_loadu_si512(bias + lane);
        const __m512 factor = _mm512_loadu_ps(factors + lane);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) {
                const __m512i sum = _mm512_add_epi32(_mm512_srai_epi32(y[i][j], 2), b);
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor);
                value = _mm512_max_ps(_mm512_min_ps(value, high), low);
                const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(value), zero); /* to even */
                _mm_storeu_si128((__m128i *)(out + (i * s->width + j) * s->outputs + lane), _mm512_cvtepi32_epi8(code));
            }
    }
}

/* start (outputs / 64, 16, 64): what undoes the offsets; bias and factors (outputs). Works on the tiles first <= t < last
 * of (images, ceil(height / 2), ceil(width / 2)), so that threads can share the work, each with scratch of its own. */
void qdbev_winograd(const Shape *s, const uint8_t *x, const int8_t *weights, const int32_t *start, const int32_t *bias,
                    const float *factors, uint8_t *out, uint8_t *scratch, int64_t first, int64_t last)
{
    const int64_t high = (s->height + 1) / 2, wide = (s->width + 1) / 2, pixels = s->height * s->width;
    uint8_t *tiles = (uint8_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    int32_t *sums = (int32_t *)(tiles + SPOTS * BLOCK * s->inputs);
    const int64_t tile_stride = BLOCK * s->inputs, sum_stride = BLOCK * LANES;
    for (int64_t from = first; from < last; from += BLOCK) {
        const int64_t count = last - from < BLOCK ? last - from : BLOCK;
        for (int64_t n = 0; n < count; n++) {
            const int64_t t = from + n, image = t / (high * wide), row = t / wide % high, column = t % wide;
            for (int64_t channel = 0; channel < s->inputs; channel += 64)
                transform_tile(s, x + image * pixels * s->inputs, 2 * row - 1, 2 * column - 1, channel,
                               tiles + n * s->inputs + channel, tile_stride);
        }
        for (int64_t lane = 0; lane < s->outputs; lane += LANES) {
            for (int spot = 0; spot < SPOTS; spot++)
                for (int64_t n = 0; n < count; n += ROWS) /* the last rows may be left from the block before */
                    multiply(tiles + spot * tile_stride + n * s->inputs, weights + (lane * SPOTS + spot * LANES) * s->inputs,
                             start + lane * SPOTS + spot * LANES, s->inputs, sums + spot * sum_stride + n * LANES);
            for (int64_t n = 0; n < count; n++) {
                const int64_t t = from + n, image = t / (high * wide), row = t / wide % high, column = t % wide;
                const int64_t pixel = image * pixels + 2 * row * s->width + 2 * column;
                finish_tile(s, sums + n * LANES, sum_stride, bias + lane, factors + lane, out + pixel * s->outputs + lane,
                            s->height - 2 * row < 2 ? 1 : 2, s->width - 2 * column < 2 ? 1 : 2);
            }
        }
    }
}

#else
int qdbev_winograd_runs(void) { return 0; }
#endif
