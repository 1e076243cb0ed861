/* The vocabulary sweep on CPUs: the two kernels of `Sweep` in sweep.py, for float32 and bfloat16.

   Compiled and called by sweep_c.py. A row is read from memory once: a block of it goes into the
   first-level cache, where its maximum, exponentials and sums are taken; when the maximum rises,
   the sums so far are rescaled. Nothing here depends on a row's address, on the rows beside it or
   on the thread that runs it, so that equal rows give equal bits. Arithmetic is float32 with sums
   over blocks in double. Vectors are the compiler's own (GCC, Clang), so this is not tied to a
   processor. Needs IEEE semantics: never compile with -ffast-math. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)
#define UNROLL 4 /* accumulators, to hide the latency of an addition */
#define BLOCK (2048 / LANES) /* vectors; 8 KiB */

#define LOWEST (-__FLT_MAX__)
#define INFINITE __builtin_inff()
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef uint32_t bits __attribute__((vector_size(BYTES)));
typedef uint16_t halves __attribute__((vector_size(BYTES / 2)));

enum kind { FLOAT32, BFLOAT16 };

INLINE vec all(float x) { return (vec){0} + x; }

INLINE vec select(ints where, vec yes, vec no) {
    return (vec)((where & (ints)yes) | (~where & (ints)no));
}

/* The larger one; `other` where `x` is NaN. */
INLINE vec larger(vec x, vec other) { return select(x > other, x, other); }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE size_t width(enum kind kind) { return kind == FLOAT32 ? 4 : 2; }

INLINE vec widen(halves x) { return (vec)(__builtin_convertvector(x, bits) << 16); }

/* To the nearest, ties to even; NaN stays NaN. */
INLINE halves narrow(vec x) {
    bits b = (bits)x;
    bits rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    bits is_nan = (bits)(x != x);
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), halves);
}

/* Columns `column` to `column + LANES - 1` of a row; -inf from column `real` on. The whole vectors
   and the last one have variables of their own, or the compiler takes all through the stack. */
INLINE vec load(enum kind kind, const char *row, int64_t column, int64_t real) {
    const char *from = row + column * width(kind);
    int64_t left = real - column;
    if (left >= LANES) {
        vec whole;
        halves half;
        if (kind == FLOAT32) return memcpy(&whole, from, sizeof whole), whole;
        return memcpy(&half, from, sizeof half), widen(half);
    }
    vec whole = all(-INFINITE);
    halves half = (halves){0} + 0xff80;
    size_t bytes = left > 0 ? left * width(kind) : 0;
    memcpy(kind == FLOAT32 ? (void *)&whole : (void *)&half, from, bytes);
    return kind == FLOAT32 ? whole : widen(half);
}

INLINE void store(enum kind kind, char *row, int64_t column, int64_t real, vec x) {
    char *to = row + column * width(kind);
    int64_t left = real - column;
    if (left >= LANES) {
        halves half = narrow(x);
        memcpy(to, kind == FLOAT32 ? (void *)&x : (void *)&half, LANES * width(kind));
        return;
    }
    vec whole = x;
    halves half = narrow(x);
    memcpy(to, kind == FLOAT32 ? (void *)&whole : (void *)&half, left * width(kind));
}

/* exp(x) for x <= 88 within 1 ulp; 0 where it is below the normal numbers; NaN for NaN. */
INLINE vec exponential(vec x) {
    const float nearest = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504f + nearest) - nearest;
    /* ln 2 in two parts, of which the first times n is exact. */
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    /* Minimax in relative error, 3e-9 on |r| <= ln(2)/2. */
    vec p = r * 0x1.6a2434p-10f + 0x1.1239e2p-7f;
    p = p * r + 0x1.5558f2p-5f;
    p = p * r + 0x1.555492p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * r * r + r + 1.0f;
    bits exponent = (bits)__builtin_convertvector(n, ints) << 23;
    p = (vec)((bits)p + exponent);
    return select(x < -87.33654f, all(0.0f), p);
}

INLINE double total(const vec *x) {
    double sum = 0;
    for (int i = 0; i < UNROLL; i++)
        for (int j = 0; j < LANES; j++) sum += x[i][j];
    return sum;
}

struct sums {
    float top;
    double exp, weighted; /* sums of e = exp(z - top) and of (z - top) e */
};

INLINE struct sums row_sums(enum kind kind, const char *row, float temperature, int64_t real) {
    vec z[BLOCK];
    struct sums s = {LOWEST, 0, 0};
    for (int64_t start = 0; start < real; start += BLOCK * LANES) {
        int64_t vectors = smaller((real - start + LANES - 1) / LANES, BLOCK);
        vec tops[UNROLL], exps[UNROLL] = {{0}}, weighted[UNROLL] = {{0}};
        for (int j = 0; j < UNROLL; j++) tops[j] = all(s.top);
        for (int64_t i = 0; i < vectors; i += UNROLL)
            for (int j = 0; j < UNROLL; j++) {
                z[i + j] = load(kind, row, start + (i + j) * LANES, real) / temperature;
                tops[j] = larger(z[i + j], tops[j]);
            }
        float top = s.top;
        for (int i = 0; i < UNROLL; i++)
            for (int j = 0; j < LANES; j++) top = tops[i][j] > top ? tops[i][j] : top;
        if (top > s.top) {
            /* In double, which holds the first rise from LOWEST too. */
            double rise = (double)top - s.top, scale = __builtin_exp(-rise);
            s.weighted = scale * (s.weighted - rise * s.exp);
            s.exp *= scale;
            s.top = top;
        }
        for (int64_t i = 0; i < vectors; i += UNROLL)
            for (int j = 0; j < UNROLL; j++) {
                /* exp(-200) is 0, and 0 * -200 is too, unlike 0 * -inf. */
                vec d = z[i + j] - top;
                d = select(d < -200.0f, all(-200.0f), d);
                vec e = exponential(d);
                exps[j] += e;
                weighted[j] += d * e;
            }
        s.exp += total(exps);
        s.weighted += total(weighted);
    }
    return s;
}

INLINE float element(enum kind kind, const char *row, int64_t column) {
    if (kind == FLOAT32) {
        float x;
        memcpy(&x, row + column * sizeof x, sizeof x);
        return x;
    }
    uint16_t half;
    memcpy(&half, row + column * sizeof half, sizeof half);
    uint32_t b = (uint32_t)half << 16;
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

/* Rows `first` to `last - 1`. Strides count elements; tensors without one are contiguous. */
INLINE void partials(enum kind kind, const char *logits, int64_t stride, const int64_t *ids,
                     const float *temperature, int64_t real, const uint8_t *mask, float *out,
                     int64_t rows, int64_t num_ids, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
        if (mask && !mask[t]) {
            for (int64_t i = 0; i < 3 + num_ids; i++) out[i * rows + t] = 0;
            continue;
        }
        const char *row = logits + t * stride * (int64_t)width(kind);
        struct sums s = row_sums(kind, row, temperature[t], real);
        /* The comparisons above pass over NaN. */
        for (int64_t v = 0; s.exp != s.exp && s.top == s.top && v < real; v++) {
            float x = element(kind, row, v);
            if (x != x) s.top = x;
        }
        out[t] = s.top;
        out[rows + t] = s.exp;
        out[2 * rows + t] = s.weighted;
        for (int64_t k = 0; k < num_ids; k++) {
            int64_t id = ids[t * num_ids + k];
            out[(3 + k) * rows + t] = id < 0 ? 0 : element(kind, row, id) / temperature[t];
        }
    }
}

struct gradient_row {
    float temperature, top, log_total, slope, offset;
};

/* p (slope log p + offset): the gradient without the terms of the ids themselves. */
INLINE vec softmax_part(vec logits, const struct gradient_row *g) {
    vec log_p = logits / g->temperature - g->top - g->log_total;
    /* Where p = 0 the bracket only has to be finite. */
    log_p = select(log_p < -1e3f, all(-1e3f), log_p);
    return exponential(log_p) * (g->slope * log_p + g->offset);
}

INLINE void gradient(enum kind kind, const char *logits, int64_t stride, const int64_t *ids,
                     const float *temperature, int64_t real, const uint8_t *mask, const float *top,
                     const float *log_total, const float *entropy, const float *grad_logprobs,
                     const float *grad_entropy, enum kind out_kind, char *out, int64_t out_stride,
                     float *scratch, int64_t columns, int64_t num_ids, int64_t first,
                     int64_t last) {
    for (int64_t t = first; t < last; t++) {
        const char *row = logits + t * stride * (int64_t)width(kind);
        char *to = out + t * out_stride * (int64_t)width(out_kind);
        int64_t filled = mask && !mask[t] ? 0 : real;
        memset(to + filled * width(out_kind), 0, (columns - filled) * width(out_kind));
        if (!filled) continue;
        const int64_t *id = ids + t * num_ids;
        const float *grad = grad_logprobs + t * num_ids;
        double scale = 1 / (double)temperature[t], slope = 0, offset = 0;
        for (int64_t k = 0; k < num_ids; k++) offset -= grad[k] * scale;
        if (grad_entropy) {
            slope = -grad_entropy[t] * scale;
            offset += slope * entropy[t];
        }
        struct gradient_row g = {temperature[t], top[t], log_total[t], slope, offset};
        /* The ids' own elements, before `out` overwrites their logits, and rounded once. */
        float *picked = scratch + t * num_ids;
        for (int64_t k = 0; k < num_ids; k++) {
            if (id[k] < 0) continue;
            double own = softmax_part(all(element(kind, row, id[k])), &g)[0];
            for (int64_t other = 0; other < num_ids; other++)
                if (id[other] == id[k]) own += grad[other] * scale;
            picked[k] = own;
        }
        for (int64_t v = 0; v < real; v += LANES) {
            vec x = load(kind, row, v, real);
            store(out_kind, to, v, real, softmax_part(x, &g));
        }
        for (int64_t k = 0; k < num_ids; k++)
            if (id[k] >= 0) store(out_kind, to, id[k], id[k] + 1, all(picked[k]));
    }
}

/* What sweep_c.py calls: each pair of types is compiled by itself. */

#define PARTIALS(kind) \
    partials(kind, logits, stride, ids, temperature, real, mask, out, rows, num_ids, first, last)

void sweep_partials(int kind, const char *logits, int64_t stride, const int64_t *ids,
                    const float *temperature, int64_t real, const uint8_t *mask, float *out,
                    int64_t rows, int64_t num_ids, int64_t first, int64_t last) {
    if (kind == FLOAT32) PARTIALS(FLOAT32);
    else PARTIALS(BFLOAT16);
}

#define GRADIENT(kind, out_kind)                                                                  \
    gradient(kind, logits, stride, ids, temperature, real, mask, top, log_total, entropy,         \
             grad_logprobs, grad_entropy, out_kind, out, out_stride, scratch, columns, num_ids,   \
             first, last)

void sweep_gradient(int kind, const char *logits, int64_t stride, const int64_t *ids,
                    const float *temperature, int64_t real, const uint8_t *mask, const float *top,
                    const float *log_total, const float *entropy, const float *grad_logprobs,
                    const float *grad_entropy, int out_kind, char *out, int64_t out_stride,
                    float *scratch, int64_t columns, int64_t num_ids, int64_t first,
                    int64_t last) {
    if (kind == FLOAT32 && out_kind == FLOAT32) GRADIENT(FLOAT32, FLOAT32);
    else if (kind == FLOAT32) GRADIENT(FLOAT32, BFLOAT16);
    else if (out_kind == FLOAT32) GRADIENT(BFLOAT16, FLOAT32);
    else GRADIENT(BFLOAT16, BFLOAT16);
}
