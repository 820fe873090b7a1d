/* SPDX-License-Identifier: Apache-2.0 */
/* Convolutions on 8-bit codes, exact sums in int32, for processors with AVX-512 VNNI. Built by native.py.
 *
 * Codes lie channels last, (images, height, width, channels) uint8; outputs divide by 64. Two ways, one product:
 * - plain: every tap of the kernel is a run of bytes of the picture, times its weights. What follows a convolution in a
 *   residual network is done while the sums are at hand: rounding to codes, cutting off, adding the shortcut's.
 * - Winograd's F(2x2, 3x3): four outputs side by side take 16 products a channel instead of 36:
 *   y = A' [(G w G') . (B' d B)] A. B adds and subtracts four codes, which makes 8 bits of 6; 2G at most nine weights,
 *   which makes 7 bits of 4: both fit the processor's product of unsigned and signed bytes, and the factor of 4 divides
 *   without a rest. So the sums are those of the plain way to the last bit, which networks of 8 bits cannot have.
 */
#include <stdint.h>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#define LANES 64 /* outputs of a pass */
#define ROWS 6   /* pixels or tiles whose sums stay in registers: 6 x 64 of them are 24 of the 32 */
#define BLOCK 48 /* pixels or tiles of a pass: what they need stays in the second cache */
#define SPOTS 16 /* of a transformed tile */

typedef struct {
    int64_t images, height, width, pixel;   /* of the input; bytes from pixel to pixel */
    int64_t inputs, rows, columns;          /* bytes that a tap reads, a multiple of 4; taps */
    int64_t stride, padding, out_height, out_width, outputs;
    int32_t zero, plain_sum;                /* code that stands for 0; Winograd's spot 5 needs no offset */
    int32_t out_zero, low, high;            /* the result's code for 0, its lowest and highest code */
    int32_t other_zero, sum_zero, sum_low, sum_high; /* of the shortcut, and of the sum with it */
    float own_factor, other_factor;         /* from codes of the result and of the shortcut to those of the sum */
} Shape;

int qdbev_convolution_runs(void) { return 1; }

/* Bytes that a thread needs beside its arguments. */
int64_t qdbev_convolution_scratch(const Shape *s)
{
    return s->inputs + 64;
}

int64_t qdbev_winograd_scratch(const Shape *s)
{
    return SPOTS * BLOCK * s->inputs + (int64_t)SPOTS * BLOCK * LANES * sizeof(int32_t) + 64;
}

static uint8_t *aligned(uint8_t *scratch) { return (uint8_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63); }

/* Sums of ROWS pixels and LANES outputs. at[t * BLOCK + i] + offset: where tap t of pixel i begins; weights (taps,
 * inputs / 4, LANES, 4). The 24 sums have names of their own, because compilers keep an array of them on the stack. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(i) __m512i a##i = begin[0], b##i = begin[1], c##i = begin[2], d##i = begin[3];
#define POINT(i) const uint8_t *p##i = at[i] + offset;
#define ADD(i)                                                                   \
    {                                                                            \
        const __m512i four = _mm512_set1_epi32(*(const int32_t *)(p##i + k));    \
        a##i = _mm512_dpbusd_epi32(a##i, four, w0);                              \
        b##i = _mm512_dpbusd_epi32(b##i, four, w1);                              \
        c##i = _mm512_dpbusd_epi32(c##i, four, w2);                              \
        d##i = _mm512_dpbusd_epi32(d##i, four, w3);                              \
    }
#define STORE(i)                                      \
    _mm512_storeu_si512(sums + i * LANES, a##i);      \
    _mm512_storeu_si512(sums + i * LANES + 16, b##i); \
    _mm512_storeu_si512(sums + i * LANES + 32, c##i); \
    _mm512_storeu_si512(sums + i * LANES + 48, d##i);

static void multiply(const uint8_t *const *at, int64_t offset, int64_t taps, int64_t inputs, const int8_t *weights,
                     const int32_t *start, int32_t *sums)
{
    const __m512i begin[4] = {_mm512_loadu_si512(start), _mm512_loadu_si512(start + 16),
                              _mm512_loadu_si512(start + 32), _mm512_loadu_si512(start + 48)};
    EACH_ROW(BEGIN)
    for (int64_t t = 0; t < taps; t++, at += BLOCK) {
        EACH_ROW(POINT)
        for (int64_t k = 0; k < inputs; k += 4, weights += 4 * LANES) {
            const __m512i w0 = _mm512_loadu_si512(weights), w1 = _mm512_loadu_si512(weights + 64);
            const __m512i w2 = _mm512_loadu_si512(weights + 128), w3 = _mm512_loadu_si512(weights + 192);
            _mm_prefetch((const char *)(p0 + ROWS * (inputs + k)), _MM_HINT_T0); /* the next rows, if they follow */
            EACH_ROW(ADD)
        }
    }
    EACH_ROW(STORE)
}

/* What follows a sum, for LANES outputs: times a factor, rounded to even, cut off; with a shortcut, the same once more. */
typedef struct {
    __m512 most, least, sum_most, own_factor, other_factor; /* as numbers of codes, counted from the code of zero */
    __m512i other_zero, order;
    __m512i zero, low, high; /* of the codes that are stored, as 16, 8 and 8 bits */
} Ending;

static Ending ending(const Shape *s, int with_other)
{
    const int32_t zero = with_other ? s->sum_zero : s->out_zero;
    const Ending e = {
        _mm512_set1_ps((float)(s->high - s->out_zero)), _mm512_set1_ps((float)(s->low - s->out_zero)),
        _mm512_set1_ps((float)(s->sum_high - s->sum_zero)), _mm512_set1_ps(s->own_factor), _mm512_set1_ps(s->other_factor),
        _mm512_set1_epi32(s->other_zero), _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        _mm512_set1_epi16((int16_t)zero), _mm512_set1_epi8((char)(with_other ? s->sum_low : s->low)),
        _mm512_set1_epi8((char)(with_other ? s->sum_high : s->high))};
    return e;
}

/* 16 sums as numbers of codes, above the highest one no longer: they would not fit the integers that they become. */
static __m512 scaled(const Ending *e, __m512i sums, __m512 factors)
{
    return _mm512_min_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), factors), e->most);
}

/* Four times 16 numbers as codes. Packing works on 128 bits at a time, so what comes out is put in order. */
static void store_codes(const Ending *e, const __m512 numbers[4], uint8_t *out)
{
    const __m512i a = _mm512_packs_epi32(_mm512_cvtps_epi32(numbers[0]), _mm512_cvtps_epi32(numbers[1]));
    const __m512i b = _mm512_packs_epi32(_mm512_cvtps_epi32(numbers[2]), _mm512_cvtps_epi32(numbers[3]));
    __m512i codes = _mm512_packus_epi16(_mm512_adds_epi16(a, e->zero), _mm512_adds_epi16(b, e->zero));
    codes = _mm512_max_epu8(_mm512_min_epu8(codes, e->high), e->low);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(e->order, codes));
}

/* The codes of one pixel; `other`: the shortcut's codes there, or none. */
static void finish_pixel(const Ending *e, const int32_t *sums, const float *factors, const uint8_t *other, uint8_t *out)
{
    __m512 numbers[4];
    for (int i = 0; i < 4; i++) {
        numbers[i] = scaled(e, _mm512_loadu_si512(sums + 16 * i), _mm512_loadu_ps(factors + 16 * i));
        if (other) {
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(other + 16 * i)));
            const __m512 shortcut = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, e->other_zero));
            const __m512 own = _mm512_roundscale_ps(_mm512_max_ps(numbers[i], e->least), 0);
            const __m512 sum = _mm512_fmadd_ps(own, e->own_factor, _mm512_mul_ps(shortcut, e->other_factor));
            numbers[i] = _mm512_min_ps(sum, e->sum_most);
        }
    }
    store_codes(e, numbers, out);
}

/* Where the taps of BLOCK pixels begin, from pixel `first` on; those from `count` on are nobody's, and are the first one. */
static void point(const Shape *s, const uint8_t *x, const uint8_t *outside, int64_t first, int64_t count,
                  const uint8_t **at)
{
    int64_t column = first % s->out_width, row = first / s->out_width % s->out_height;
    const uint8_t *image = x + first / (s->out_width * s->out_height) * s->height * s->width * s->pixel;
    for (int64_t n = 0; n < count; n++) {
        const int64_t top = row * s->stride - s->padding, left = column * s->stride - s->padding;
        const uint8_t **to = at + n;
        const int64_t bottom = top + s->rows, right = left + s->columns;
        if (top >= 0 && left >= 0 && bottom <= s->height && right <= s->width) { /* most of them */
            const uint8_t *line = image + (top * s->width + left) * s->pixel;
            for (int64_t y = 0; y < s->rows; y++, line += s->width * s->pixel)
                for (int64_t c = 0; c < s->columns; c++, to += BLOCK)
                    *to = line + c * s->pixel;
        } else
            for (int64_t y = top; y < bottom; y++)
                for (int64_t c = left; c < right; c++, to += BLOCK) {
                    const int inside = y >= 0 && y < s->height && c >= 0 && c < s->width;
                    *to = inside ? image + (y * s->width + c) * s->pixel : outside;
                }
        if (++column == s->out_width) {
            column = 0;
            if (++row == s->out_height) {
                row = 0;
                image += s->height * s->width * s->pixel;
            }
        }
    }
    for (int64_t n = count; n < BLOCK; n++)
        for (int64_t t = 0; t < s->rows * s->columns; t++)
            at[t * BLOCK + n] = at[t * BLOCK];
}

/* Plain. weights (outputs / 64, rows, columns, inputs / 4, 64, 4); start (outputs): bias, less what the code of zero adds;
 * factors (outputs); other: codes of a shortcut (images, out_height, out_width, outputs), or none. Works on the pixels
 * first <= p < last of (images, out_height, out_width), so that threads can share the work, each with its scratch. */
void qdbev_convolution(const Shape *s, const uint8_t *x, const int8_t *weights, const int32_t *start,
                       const float *factors, const uint8_t *other, uint8_t *out, uint8_t *scratch, int64_t first,
                       int64_t last)
{
    const int64_t taps = s->rows * s->columns;
    const uint8_t *at[taps * BLOCK];
    int32_t sums[ROWS * LANES];
    uint8_t *outside = aligned(scratch);
    const Ending e = ending(s, other != 0);
    for (int64_t k = 0; k < s->inputs; k++)
        outside[k] = (uint8_t)s->zero;
    for (int64_t from = first; from < last; from += BLOCK) {
        const int64_t count = last - from < BLOCK ? last - from : BLOCK;
        point(s, x, outside, from, count, at);
        for (int64_t lane = 0; lane < s->outputs; lane += LANES)
            for (int64_t n = 0; n < count; n += ROWS) {
                multiply(at + n, 0, taps, s->inputs, weights + lane * taps * s->inputs, start + lane, sums);
                for (int64_t i = n; i < n + ROWS && i < count; i++) {
                    const int64_t to = (from + i) * s->outputs + lane;
                    finish_pixel(&e, sums + (i - n) * LANES, factors + lane, other ? other + to : 0, out + to);
                }
            }
    }
}

/* Two of them, the second one 1x1 on the pixels of the first one, which it finds in the cache. */
void qdbev_chain(const Shape *s, const uint8_t *x, const int8_t *weights, const int32_t *start, const float *factors,
                 const uint8_t *other, uint8_t *out, const Shape *t, const int8_t *weights2, const int32_t *start2,
                 const float *factors2, uint8_t *out2, uint8_t *scratch, int64_t first, int64_t last)
{
    for (int64_t from = first; from < last; from += BLOCK) {
        const int64_t to = last - from < BLOCK ? last : from + BLOCK;
        qdbev_convolution(s, x, weights, start, factors, other, out, scratch, from, to);
        qdbev_convolution(t, out, weights2, start2, factors2, 0, out2, scratch, from, to);
    }
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

/* A' m A of one tile, and the codes of its pixels, as many as there are. */
static void finish_tile(const Shape *s, const Ending *e, const int32_t *sums, int64_t spot_stride, const int32_t *bias,
                        const float *factors, uint8_t *out, int rows, int columns)
{
    __m512 numbers[2][2][4];
    for (int lane = 0; lane < 4; lane++) {
        __m512i t[2][4], y[2][2];
        for (int j = 0; j < 4; j++) {
            const int32_t *m = sums + j * spot_stride + 16 * lane;
            const __m512i a = _mm512_loadu_si512(m), b = _mm512_loadu_si512(m + 4 * spot_stride);
            const __m512i c = _mm512_loadu_si512(m + 8 * spot_stride), d = _mm512_loadu_si512(m + 12 * spot_stride);
            t[0][j] = _mm512_add_epi32(_mm512_add_epi32(a, b), c);
            t[1][j] = _mm512_sub_epi32(_mm512_sub_epi32(b, c), d);
        }
        for (int i = 0; i < 2; i++) {
            y[i][0] = _mm512_add_epi32(_mm512_add_epi32(t[i][0], t[i][1]), t[i][2]);
            y[i][1] = _mm512_sub_epi32(_mm512_sub_epi32(t[i][1], t[i][2]), t[i][3]);
            for (int j = 0; j < 2; j++) {
                const __m512i sum = _mm512_add_epi32(_mm512_srai_epi32(y[i][j], 2), _mm512_loadu_si512(bias + 16 * lane));
                numbers[i][j][lane] = scaled(e, sum, _mm512_loadu_ps(factors + 16 * lane));
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            store_codes(e, numbers[i][j], out + (i * s->width + j) * s->outputs);
}

/* Stride 1, padding 1, inputs divide by 64. weights (outputs / 64, 16, inputs / 4, 64, 4): 2G w 2G'; start (outputs / 64,
 * 16, 64): what undoes the offsets; bias and factors (outputs). Works on the tiles first <= t < last of (images,
 * ceil(height / 2), ceil(width / 2)). */
void qdbev_winograd(const Shape *s, const uint8_t *x, const int8_t *weights, const int32_t *start, const int32_t *bias,
                    const float *factors, uint8_t *out, uint8_t *scratch, int64_t first, int64_t last)
{
    const int64_t high = (s->height + 1) / 2, wide = (s->width + 1) / 2, pixels = s->height * s->width;
    uint8_t *tiles = aligned(scratch);
    int32_t *sums = (int32_t *)(tiles + SPOTS * BLOCK * s->inputs);
    const int64_t tile_stride = BLOCK * s->inputs, sum_stride = BLOCK * LANES;
    const uint8_t *at[BLOCK];
    const Ending e = ending(s, 0);
    for (int64_t n = 0; n < BLOCK; n++)
        at[n] = tiles + n * s->inputs;
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
                    multiply(at + n, spot * tile_stride, 1, s->inputs, weights + (lane * SPOTS + spot * LANES) * s->inputs,
                             start + lane * SPOTS + spot * LANES, sums + spot * sum_stride + n * LANES);
            for (int64_t n = 0; n < count; n++) {
                const int64_t t = from + n, image = t / (high * wide), row = t / wide % high, column = t % wide;
                const int64_t pixel = image * pixels + 2 * row * s->width + 2 * column;
                finish_tile(s, &e, sums + n * LANES, sum_stride, bias + lane, factors + lane, out + pixel * s->outputs + lane,
                            s->height - 2 * row < 2 ? 1 : 2, s->width - 2 * column < 2 ? 1 : 2);
            }
        }
    }
}

/* The largest of rows x columns pixels. Works on the pixels first <= p < last of (images, out_height, out_width). */
void qdbev_max_pool(const Shape *s, const uint8_t *x, uint8_t *out, int64_t first, int64_t last)
{
    for (int64_t p = first; p < last; p++) {
        const int64_t image = p / (s->out_height * s->out_width);
        const int64_t top = p / s->out_width % s->out_height * s->stride - s->padding;
        const int64_t left = p % s->out_width * s->stride - s->padding;
        for (int64_t channel = 0; channel < s->inputs; channel += 64) {
            __m512i most = _mm512_setzero_si512();
            for (int64_t y = top < 0 ? 0 : top; y < top + s->rows && y < s->height; y++)
                for (int64_t column = left < 0 ? 0 : left; column < left + s->columns && column < s->width; column++)
                    most = _mm512_max_epu8(most, _mm512_loadu_si512(x + ((image * s->height + y) * s->width + column) * s->pixel + channel));
            _mm512_storeu_si512(out + p * s->inputs + channel, most);
        }
    }
}

/* Planes (images, 3, height, width) as pixels of four bytes, the fourth 0, with `padding` codes of zero all around. Works
 * on the rows first <= r < last of (images, height + 2 padding). */
void qdbev_pack_pixels(const Shape *s, const uint8_t *planes, uint32_t *out, int64_t first, int64_t last)
{
    const int64_t wide = s->width + 2 * s->padding, area = s->height * s->width;
    const uint32_t zero = (uint32_t)s->zero * 0x010101u;
    for (int64_t r = first; r < last; r++) {
        const int64_t y = r % (s->height + 2 * s->padding) - s->padding;
        uint32_t *row = out + r * wide;
        if (y < 0 || y >= s->height) {
            for (int64_t x = 0; x < wide; x++)
                row[x] = zero;
            continue;
        }
        const uint8_t *a = planes + r / (s->height + 2 * s->padding) * 3 * area + y * s->width;
        for (int64_t x = 0; x < s->padding; x++)
            row[x] = row[wide - 1 - x] = zero;
        for (int64_t x = 0; x < s->width; x++)
            row[s->padding + x] = a[x] | (uint32_t)a[area + x] << 8 | (uint32_t)a[2 * area + x] << 16;
    }
}

#else
int qdbev_convolution_runs(void) { return 0; }
#endif
