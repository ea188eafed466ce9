/* What a step of one token for each row spends its time in: products with a weight, RMSNorm, attention to a cache.

   Compiled for one kind of numbers in a weight (-DWEIGHT=) and one of all others (-DOTHER=, FLOAT32 or BFLOAT16). A
   weight is read once, row by row, its lines asked for ahead; all sums are float32. Each output is summed in an order
   of its own, whatever stands beside it: what a row says does not depend on its batch, nor on its padding.

   Vectors are the compiler's own extension, as wide as the processor's registers: AVX-512, AVX2 or NEON.
   Shapes: B rows, N outputs, I inputs, H query heads, K key heads, G = H / K, E head dim, S slots of the cache. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FLOAT32 0
#define BFLOAT16 1
#define INT8 2

/* WIDTH numbers are in a register. A tile of ROWS outputs and COLUMNS rows of x keeps its sums in registers. */
#if defined __AVX512F__
#define WIDTH 16
#define ROWS 4
#define COLUMNS 4
#elif defined __AVX__
#define WIDTH 8
#define ROWS 4
#define COLUMNS 3
#else
#define WIDTH 4
#define ROWS 4
#define COLUMNS 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16") /* sums stay in registers */
#define AHEAD 32768 /* bytes; the processor's own prefetching ends at a page */
#define VECTOR(bytes) __attribute__((vector_size(bytes)))

typedef float floats VECTOR(4 * WIDTH);
typedef int32_t signed_words VECTOR(4 * WIDTH);
typedef uint32_t words VECTOR(4 * WIDTH);
typedef float floats_anywhere __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t words_anywhere __attribute__((vector_size(4 * WIDTH), aligned(1)));
typedef uint16_t halves_anywhere __attribute__((vector_size(2 * WIDTH), aligned(2)));

INLINE float sum(floats a) {
    for (int apart = WIDTH / 2; apart; apart /= 2)
        for (int lane = 0; lane < apart; lane++) a[lane] += a[lane + apart];
    return a[0];
}

INLINE floats load_float(const float *p) { return *(const floats_anywhere *)p; }

#if OTHER == BFLOAT16
typedef uint16_t other;
INLINE float get(other bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
INLINE other rounded(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (other)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE floats load(const other *p) { return (floats)(__builtin_convertvector(*(const halves_anywhere *)p, words) << 16); }
#else
typedef float other;
INLINE float get(other value) { return value; }
INLINE other rounded(float value) { return value; }
INLINE floats load(const other *p) { return load_float(p); }
#endif

/* A word of a weight holds PARTS of its numbers, which shifts take out. So x is laid out in the order in which they
   come: sixteen first parts, then sixteen second ones. */
#if WEIGHT == FLOAT32
#define PARTS 1
INLINE floats part_of(words some, int part) { return (void)part, (floats)some; }
#elif WEIGHT == BFLOAT16
#define PARTS 2
INLINE floats part_of(words some, int part) { return part ? (floats)(some & 0xffff0000u) : (floats)(some << 16); }
#else
#define PARTS 4
INLINE floats part_of(words some, int part) {
    return __builtin_convertvector((signed_words)(some << (24 - 8 * part)) >> 24, floats);
}
#endif

static void lay_out(const other *x, float *out, long I) {
    for (long first = 0; first < I; first += 16 * PARTS)
        for (long part = 0; part < PARTS; part++)
            for (long lane = 0; lane < 16; lane++) *out++ = get(x[first + lane * PARTS + part]);
}

typedef struct {
    const char *weight;
    const float *scale, *bias, *x;
    other *y;
    long N, I, B;
} product;

/* Outputs n to n + R of the rows b to b + C. */
INLINE void tile(const product *p, long n, long b, int R, int C) {
    long bytes = p->I * 4 / PARTS, I = p->I;
    const char *w = p->weight + n * bytes;
    const float *x = p->x + b * I;
    floats sums[8][4];
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int c = 0; c < C; c++) sums[r][c] = (floats){0};
    for (long at = 0; at < bytes; at += 64, x += 16 * PARTS) {
        if (b == 0) /* what follows finds the weight in the cache */
            UNROLLED for (int r = 0; r < R; r++) __builtin_prefetch(w + r * bytes + at + AHEAD);
        UNROLLED for (int lane = 0; lane < 16; lane += WIDTH)
            UNROLLED for (int part = 0; part < PARTS; part++) {
                floats numbers[4];
                UNROLLED for (int c = 0; c < C; c++) numbers[c] = load_float(x + c * I + part * 16 + lane);
                UNROLLED for (int r = 0; r < R; r++) {
                    floats weights = part_of(*(const words_anywhere *)(w + r * bytes + at + lane * 4), part);
                    UNROLLED for (int c = 0; c < C; c++) sums[r][c] += weights * numbers[c];
                }
            }
    }
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int c = 0; c < C; c++) {
            float value = sum(sums[r][c]);
            if (p->scale) value *= p->scale[n + r];
            if (p->bias) value += p->bias[n + r];
            p->y[(b + c) * p->N + n + r] = rounded(value);
        }
}

static void eight(const product *p, long n) {
    if (p->B == 1) {
        tile(p, n, 0, 8, 1);
        return;
    }
    for (long rows = n; rows < n + 8; rows += ROWS)
        for (long b = 0; b < p->B;)
            if (p->B - b >= COLUMNS) tile(p, rows, b, ROWS, COLUMNS), b += COLUMNS;
            else if (p->B - b >= 2) tile(p, rows, b, ROWS, 2), b += 2;
            else tile(p, rows, b, ROWS, 1), b += 1;
}

/* y[B, N] = x[B, I] W^T * scale + bias. I is a multiple of 64; scale and bias may be null. 1 where memory lacks. */
int lapis_product(const void *weight, const float *scale, const float *bias, const other *x, other *y, long N, long I,
                  long B, int threads) {
    float *laid_out = aligned_alloc(64, (size_t)(B * I) * sizeof(float));
    if (!laid_out) return 1;
    for (long b = 0; b < B; b++) lay_out(x + b * I, laid_out + b * I, I);
    product p = {weight, scale, bias, laid_out, y, N, I, B};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long block = 0; block < N / 8; block++) eight(&p, block * 8);
    for (long n = N / 8 * 8; n < N; n++)
        for (long b = 0; b < B; b++) tile(&p, n, b, 1, 1);
    free(laid_out);
    return 0;
}

/* x / sqrt(mean(x^2) + eps) * gain, of D numbers, a multiple of 16. */
INLINE void norm(const other *x, const float *gain, float eps, float *y, long D) {
    floats squares = {0};
    for (long i = 0; i < D; i += WIDTH) squares += load(x + i) * load(x + i);
    float inverse = 1 / sqrtf(sum(squares) / (float)D + eps);
    for (long i = 0; i < D; i += WIDTH) *(floats_anywhere *)(y + i) = load(x + i) * inverse * load_float(gain + i);
}

/* Each of the rows normed. */
int lapis_rms_norm(const other *x, const float *gain, float eps, other *y, long rows, long D) {
    float *wide = aligned_alloc(64, (size_t)(D + 15) / 16 * 64);
    if (!wide) return 1;
    for (long row = 0; row < rows; row++) {
        norm(x + row * D, gain, eps, wide, D);
        for (long i = 0; i < D; i++) y[row * D + i] = rounded(wide[i]);
    }
    free(wide);
    return 0;
}

/* e^x for x <= 0, to 2e-7: 2^n times a polynomial (Cephes' expf). What is no number stays none. */
INLINE floats exp_of(floats x) {
    floats lowest = (floats){0} - 87.0f;
    signed_words below = x < lowest;
    x = (floats)(((signed_words)lowest & below) | ((signed_words)x & ~below));
    signed_words n = __builtin_convertvector(x * 1.44269504f - 0.5f, signed_words);
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats y = (floats){0} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (floats)((n + 127) << 23);
}

typedef struct {
    const other *qkv;             /* [B, H + 2K, E]: one new token of each row */
    const float *q_gain, *k_gain; /* [E]; null where queries and keys have no norm */
    const other *cos, *sin;       /* [E], or [B, E] where turn is E; null where nothing is turned */
    other *keys, *values;         /* [B, K, room, E] */
    const int64_t *first, *last;  /* [B]: the slots that a row sees; the last is that of its new token */
    const other *mask;            /* of the slots from first on, [S], or [B, S] where hidden is S; null hides nothing */
    other *out;                   /* [B, H, E] */
    long H, K, E, room, turn, hidden;
    float scale, eps;
} attention;

/* A head of queries or keys, normed and turned. */
INLINE void prepared(const attention *a, const other *x, const float *gain, long b, float *y) {
    long E = a->E, half = E / 2;
    float plain[E];
    if (gain) norm(x, gain, a->eps, plain, E);
    else for (long e = 0; e < E; e++) plain[e] = get(x[e]);
    if (!a->cos) {
        memcpy(y, plain, sizeof(plain));
        return;
    }
    const other *cos = a->cos + b * a->turn, *sin = a->sin + b * a->turn;
    for (long e = 0; e < half; e++) {
        y[e] = plain[e] * get(cos[e]) + plain[e + half] * get(sin[e]);
        y[e + half] = plain[e + half] * get(cos[e + half]) + plain[e] * get(sin[e + half]);
    }
}

/* Some registers of a head's values, weighted and summed. */
INLINE void mix(const attention *a, const other *values, const long *seen, const float *weights, long count,
                float share, int registers, other *out) {
    floats mixed[64 / WIDTH];
    UNROLLED for (int i = 0; i < registers; i++) mixed[i] = (floats){0};
    for (long s = 0; s < count; s++)
        UNROLLED for (int i = 0; i < registers; i++) mixed[i] += weights[s] * load(values + seen[s] * a->E + i * WIDTH);
    for (int i = 0; i < registers; i++)
        for (int lane = 0; lane < WIDTH; lane++) out[i * WIDTH + lane] = rounded(mixed[i][lane] * share);
}

/* One head of keys, and the heads of queries that share it, for one row. */
static int attend(const attention *a, long b, long k) {
    long E = a->E, G = a->H / a->K, first = a->first[b], last = a->last[b], S = last - first + 1;
    const other *row = a->qkv + b * (a->H + 2 * a->K) * E, *mask = a->mask ? a->mask + b * a->hidden : 0;
    other *keys = a->keys + (b * a->K + k) * a->room * E, *values = a->values + (b * a->K + k) * a->room * E;
    float head[E];
    prepared(a, row + (a->H + k) * E, a->k_gain, b, head);
    for (long e = 0; e < E; e++) keys[last * E + e] = rounded(head[e]);
    memcpy(values + last * E, row + (a->H + a->K + k) * E, (size_t)E * sizeof(other));

    long *seen = malloc((size_t)(S + 16) * (sizeof(long) + sizeof(float)));
    if (!seen) return 1;
    float *weights = (float *)(seen + S);
    long count = 0;
    for (long s = 0; s < S; s++)
        if (!mask || get(mask[s]) > -1e30f) seen[count++] = first + s;
    for (long g = 0; g < G; g++) {
        prepared(a, row + (k * G + g) * E, a->q_gain, b, head);
        float most = -INFINITY;
        for (long s = 0; s < count; s++) {
            floats dot = {0};
            for (long e = 0; e < E; e += WIDTH) dot += load_float(head + e) * load(keys + seen[s] * E + e);
            weights[s] = sum(dot) * a->scale;
            if (weights[s] > most) most = weights[s];
        }
        for (long s = count; s < (count + 15) / 16 * 16; s++) weights[s] = -INFINITY;
        floats sums = {0};
        for (long s = 0; s < count; s += WIDTH) {
            floats w = exp_of(load_float(weights + s) - most);
            sums += w;
            *(floats_anywhere *)(weights + s) = w;
        }
        float share = 1 / sum(sums);
        other *out = a->out + (b * a->H + k * G + g) * E;
        for (long e = 0; e < E; e += 64)
            if (E - e >= 64) mix(a, values + e, seen, weights, count, share, 64 / WIDTH, out + e);
            else mix(a, values + e, seen, weights, count, share, (int)(E - e) / WIDTH, out + e);
    }
    free(seen);
    return 0;
}

/* Writes the new keys and values to the last of each row's slots, and mixes the values in sight: softmax(scale * q k^T)
   v, as AttentionCore does. E is a multiple of 16. 1 where memory lacks. */
int lapis_attend(const other *qkv, const float *q_gain, const float *k_gain, float eps, const other *cos,
                 const other *sin, long turn, other *keys, other *values, long room, const int64_t *first,
                 const int64_t *last, const other *mask, long hidden, float scale, other *out, long B, long H, long K,
                 long E, int threads) {
    attention a = {qkv, q_gain, k_gain, cos, sin, keys, values, first, last, mask, out, H, K, E, room, turn, hidden,
                   scale, eps};
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (long head = 0; head < B * K; head++) failed |= attend(&a, head / K, head % K);
    return failed;
}
