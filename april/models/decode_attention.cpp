// What a decode step does to the new token's heads of one layer, for all rows at once: norms of queries and keys, rotation,
// the write into KV memory, and attention over each row's own length. Built for one model shape by april/models/kernel.py:
// HEAD_DIM is a multiple of 16, GROUP is the number of queries that share a head of keys and values.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16, kVectors = HEAD_DIM / kLanes, kTile = 128;
constexpr float kLeastExponent = -87.0f;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Loose*>(to) = value; }
inline Vec all(float value) { return value - Vec{}; }

inline float sum(Vec v) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

inline float largest(Vec v) {
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// Sums of 16 vectors as the lanes of one: each level adds the halves of two vectors into one.
inline Vec sums(Vec* v) {
    const Ints low8{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const Ints low4{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const Ints low2{0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
    const Ints low1{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int i = 0; i < 8; ++i) v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low8) + __builtin_shuffle(v[2 * i], v[2 * i + 1], low8 + 8);
    for (int i = 0; i < 4; ++i) v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low4) + __builtin_shuffle(v[2 * i], v[2 * i + 1], low4 + 4);
    for (int i = 0; i < 2; ++i) v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low2) + __builtin_shuffle(v[2 * i], v[2 * i + 1], low2 + 2);
    return __builtin_shuffle(v[0], v[1], low1) + __builtin_shuffle(v[0], v[1], low1 + 1);
}

// exp(x) for x <= 0, to 2e-7: x = n ln 2 + r, a polynomial of r (Cephes, expf), n into the exponent. NaN stays NaN.
inline Vec exponential(Vec x) {
    x = x < all(kLeastExponent) ? all(kLeastExponent) : x;
    const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Ints bits = (n + 127) << 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

// A head of queries or keys: norm and its weights where the model has them, then the pairs (2 i, 2 i + 1) rotated.
inline void prepare(const float* head, const float* weight, const float* phase, float eps, float scale, float* out) {
    float factor = 1.0f;
    if (weight) {
        Vec squares{};
        for (int i = 0; i < kVectors; ++i) squares += load(head + i * kLanes) * load(head + i * kLanes);
        factor = 1.0f / std::sqrt(sum(squares) / HEAD_DIM + eps);
    }
    float normed[HEAD_DIM];
    for (int i = 0; i < HEAD_DIM; ++i) normed[i] = head[i] * factor * (weight ? weight[i] : 1.0f);
    for (int i = 0; i < HEAD_DIM; i += 2) {
        out[i] = scale * (normed[i] * phase[i] - normed[i + 1] * phase[i + 1]);
        out[i + 1] = scale * (normed[i] * phase[i + 1] + normed[i + 1] * phase[i]);
    }
}

// Softmax of GROUP queries over `length` keys and their weighted values, tile by tile with a running maximum.
inline void attend(const float (*query)[HEAD_DIM], const float* keys, const float* values, int64_t length, float* out) {
    Vec gathered[GROUP][kVectors] = {};
    float most[GROUP], total[GROUP] = {};
    for (int g = 0; g < GROUP; ++g) most[g] = -INFINITY;
    float weights[GROUP][kTile];
    for (int64_t start = 0; start < length; start += kTile) {
        const int64_t count = length - start < kTile ? length - start : kTile;
        for (int64_t t = 0; t < count; t += kLanes) {
            Vec parts[GROUP][kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int64_t token = start + (t + i < count ? t + i : count - 1);  // never reads behind the row's tokens
                const float* key = keys + token * HEAD_DIM;
                for (int g = 0; g < GROUP; ++g) {
                    Vec part = load(query[g]) * load(key);
                    for (int j = 1; j < kVectors; ++j) part += load(query[g] + j * kLanes) * load(key + j * kLanes);
                    parts[g][i] = part;
                }
            }
            for (int g = 0; g < GROUP; ++g) store(weights[g] + t, sums(parts[g]));
        }
        for (int g = 0; g < GROUP; ++g) {
            Vec tile = all(-INFINITY);
            for (int64_t t = count; t % kLanes; ++t) weights[g][t] = -INFINITY;
            for (int64_t t = 0; t < count; t += kLanes) {
                const Vec now = load(weights[g] + t);
                tile = now > tile ? now : tile;
            }
            const float before = most[g], found = largest(tile);
            most[g] = found > before ? found : before;
            const float shrink = exponential(all(before - most[g]))[0];
            Vec summed{};
            for (int64_t t = 0; t < count; t += kLanes) {
                const Vec weight = exponential(load(weights[g] + t) - most[g]);
                store(weights[g] + t, weight);
                summed += weight;
            }
            total[g] = total[g] * shrink + sum(summed);
            for (int j = 0; j < kVectors; ++j) gathered[g][j] *= shrink;
        }
        for (int64_t t = 0; t < count; ++t) {
            const float* value = values + (start + t) * HEAD_DIM;
            for (int j = 0; j < kVectors; ++j) {
                const Vec v = load(value + j * kLanes);
                for (int g = 0; g < GROUP; ++g) gathered[g][j] += weights[g][t] * v;
            }
        }
    }
    for (int g = 0; g < GROUP; ++g)
        for (int j = 0; j < kVectors; ++j) store(out + g * HEAD_DIM + j * kLanes, gathered[g][j] / total[g]);
}

}  // namespace

extern "C" {

// As april/models/kv_rows.py fills it; counts are of floats.
struct Step {
    int64_t num_rows, num_kv_heads, num_threads;
    const int64_t *keys;           // (rows,) address of the keys of layer 0
    const int64_t *layer_stride;   // (rows,) from a layer to the next
    const int64_t *value_stride;   // (rows,) from keys to values
    const int64_t *head_stride;    // (rows,) from a head to the next
    const int64_t *length;         // (rows,) tokens of each row, the new one included
    const float *phases;           // (positions, HEAD_DIM / 2, 2) cosine and sine
    float eps, scale;
};

// heads: (rows, (GROUP + 2) * kv heads, HEAD_DIM), queries, keys, values; norm: (queries and keys, HEAD_DIM) or null;
// out: (rows, queries, HEAD_DIM).
void april_decode_attention(const Step* step, int64_t layer, const float* heads, const float* norm, float* out) {
    const int64_t num_kv = step->num_kv_heads, num_queries = num_kv * GROUP, row_size = (num_queries + 2 * num_kv) * HEAD_DIM;
    const int64_t num_tasks = step->num_rows * num_kv;
#pragma omp parallel for schedule(dynamic, 4) num_threads(step->num_threads) if (num_tasks > 8)
    for (int64_t task = 0; task < num_tasks; ++task) {
        const int64_t row = task / num_kv, kv = task % num_kv, last = step->length[row] - 1;
        const float* mine = heads + row * row_size;
        const float* phase = step->phases + last * HEAD_DIM;
        float* keys = reinterpret_cast<float*>(step->keys[row]) + layer * step->layer_stride[row] + kv * step->head_stride[row];
        float* values = keys + step->value_stride[row];
        const int64_t key = num_queries + kv;
        prepare(mine + key * HEAD_DIM, norm ? norm + key * HEAD_DIM : nullptr, phase, step->eps, 1.0f, keys + last * HEAD_DIM);
        std::memcpy(values + last * HEAD_DIM, mine + (key + num_kv) * HEAD_DIM, sizeof(float) * HEAD_DIM);
        float query[GROUP][HEAD_DIM];
        for (int64_t g = 0; g < GROUP; ++g) {
            const int64_t head = kv * GROUP + g;
            prepare(mine + head * HEAD_DIM, norm ? norm + head * HEAD_DIM : nullptr, phase, step->eps, step->scale, query[g]);
        }
        attend(query, keys, values, last + 1, out + (row * num_queries + kv * GROUP) * HEAD_DIM);
    }
}

// silu(gate) * up for (rows, 2 * size), gates first.
void april_gated(const float* both, int64_t rows, int64_t size, int64_t num_threads, float* out) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = both + row * 2 * size, *up = gate + size;
        float* to = out + row * size;
        for (int64_t i = 0; i < size; i += kLanes) {
            const Vec g = load(gate + i), falling = exponential(g < 0.0f ? g : -g);
            store(to + i, (g < 0.0f ? falling : all(1.0f)) / (falling + 1.0f) * g * load(up + i));
        }
    }
}

// x / sqrt(mean(x^2) + eps) for (rows, size).
void april_rms_normed(const float* x, int64_t rows, int64_t size, float eps, int64_t num_threads, float* out) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * size;
        Vec squares{};
        for (int64_t i = 0; i < size; i += kLanes) squares += load(from + i) * load(from + i);
        const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += kLanes) store(out + row * size + i, load(from + i) * factor);
    }
}

}  // extern "C"
