// SHA-256 as FIPS 180-4 defines it.
#include <algorithm>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "digests.hpp"

namespace tw {
namespace {

constexpr std::array<std::uint32_t, 64> K = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t turned(std::uint32_t x, int n) { return x >> n | x << (32 - n); }

void block(std::array<std::uint32_t, 8>& h, const unsigned char* p) {
    std::array<std::uint32_t, 64> w;
    for (int i = 0; i < 16; ++i, p += 4) w[i] = std::uint32_t{p[0]} << 24 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 8 | p[3];
    for (int i = 16; i < 64; ++i) {
        std::uint32_t a = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3;
        std::uint32_t b = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    auto [a, b, c, d, e, f, g, k] = h;
    for (int i = 0; i < 64; ++i) {
        std::uint32_t t1 = k + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
        std::uint32_t t2 = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        k = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += k;
}

void blocks_anywhere(std::array<std::uint32_t, 8>& h, const unsigned char* p, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) block(h, p + 64 * i);
}

#ifdef __x86_64__
// With the instructions of the CPU, several times as fast. Their operands are the states A B E F and C D G H.
__attribute__((target("sha,sse4.1"))) void blocks_by_instructions(std::array<std::uint32_t, 8>& h, const unsigned char* p, std::size_t count) {
    auto load = [](const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); };
    const __m128i swaps = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i cdab = _mm_shuffle_epi32(load(&h[0]), 0xB1), efgh = _mm_shuffle_epi32(load(&h[4]), 0x1B);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xF0);
    for (std::size_t n = 0; n < count; ++n, p += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (std::size_t i = 0; i < 4; ++i) w[i] = _mm_shuffle_epi8(load(p + 16 * i), swaps);
        for (std::size_t i = 0; i < 16; ++i) {  // four rounds each
            __m128i words = _mm_add_epi32(w[i % 4], load(&K[4 * i]));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, words);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(words, 0x0E));
            __m128i &w0 = w[i % 4], &w1 = w[(i + 1) % 4], &w2 = w[(i + 2) % 4], &w3 = w[(i + 3) % 4];
            w0 = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4)), w3);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&h[0]), _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(&h[4]), _mm_alignr_epi8(dchg, feba, 8));
}

bool has_instructions() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1");
}
#endif

void blocks(std::array<std::uint32_t, 8>& h, const unsigned char* p, std::size_t count) {
#ifdef __x86_64__
    static const bool fast = has_instructions();
    if (fast) return blocks_by_instructions(h, p, count);
#endif
    blocks_anywhere(h, p, count);
}

}  // namespace

Sha256::Sha256() : h_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19} {}

void Sha256::update(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    std::size_t at = 0, held = size_ % 64;
    size_ += size;
    if (held) {
        at = std::min(size, 64 - held);
        if (at) std::memcpy(&tail_[held], bytes, at);
        if (held + at < 64) return;
        blocks(h_, tail_.data(), 1);
    }
    std::size_t whole = (size - at) / 64;
    blocks(h_, bytes + at, whole);
    at += 64 * whole;
    if (at < size) std::memcpy(tail_.data(), bytes + at, size - at);
}

std::string Sha256::hex() const {
    std::array<std::uint32_t, 8> h = h_;
    unsigned char last[128] = {};
    std::size_t held = size_ % 64, end = held < 56 ? 64 : 128;
    if (held) std::memcpy(last, tail_.data(), held);
    last[held] = 0x80;
    for (std::size_t i = 0; i < 8; ++i) last[end - 1 - i] = static_cast<unsigned char>(size_ * 8 >> 8 * i);
    blocks(h, last, end / 64);
    std::string hex;
    for (auto word : h)
        for (int i = 28; i >= 0; i -= 4) hex += "0123456789abcdef"[word >> i & 15];
    return hex;
}

std::string sha256(const void* data, std::size_t size) {
    Sha256 digest;
    digest.update(data, size);
    return digest.hex();
}

}  // namespace tw
