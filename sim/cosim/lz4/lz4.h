// The two functions of LZ4 that Verilator's FST writer calls, so that waves need no LZ4 library.
//
// A plain greedy compressor for the LZ4 block format: a hash of four bytes finds the latest earlier
// occurrence, and that is the match. The output is read by every LZ4 decoder.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

inline int LZ4_compressBound(int size) { return size + size / 255 + 16; }

inline int LZ4_compress_default(const char* source, char* target, int source_size, int capacity) {
    constexpr int kHashBits = 14, kLeastMatch = 4;
    // The format: the last five bytes are literals, and no match starts in the last twelve.
    constexpr int kTailLiterals = 5, kTailMatch = 12, kFarthest = 65535;
    const auto* in = reinterpret_cast<const uint8_t*>(source);
    auto* out = reinterpret_cast<uint8_t*>(target);
    if (source_size < 0 || capacity < LZ4_compressBound(source_size)) return 0;

    const auto word = [&](int i) {
        uint32_t value;
        std::memcpy(&value, in + i, sizeof value);
        return value;
    };
    const auto put_length = [&](int length) {
        for (; length >= 255; length -= 255) *out++ = 255;
        *out++ = uint8_t(length);
    };
    // Literals of [from, to), then a match of `length` bytes at `distance`; no match when it is 0.
    const auto put = [&](int from, int to, int distance, int length) {
        const int literals = to - from, extra = length - kLeastMatch;
        const int high = literals < 15 ? literals : 15;
        const int low = distance == 0 ? 0 : extra < 15 ? extra : 15;
        *out++ = uint8_t(high << 4 | low);
        if (high == 15) put_length(literals - 15);
        std::memcpy(out, in + from, size_t(literals));
        out += literals;
        if (distance == 0) return;
        *out++ = uint8_t(distance);
        *out++ = uint8_t(distance >> 8);
        if (low == 15) put_length(extra - 15);
    };

    std::vector<int> latest(size_t{1} << kHashBits, -1);
    int done = 0;
    for (int i = 0; i + kTailMatch < source_size;) {
        int& slot = latest[word(i) * 2654435761u >> (32 - kHashBits)];
        const int match = slot;
        slot = i;
        if (match < 0 || i - match > kFarthest || word(match) != word(i)) {
            ++i;
            continue;
        }
        int length = kLeastMatch;
        while (i + length < source_size - kTailLiterals && in[match + length] == in[i + length]) {
            ++length;
        }
        put(done, i, i - match, length);
        i += length;
        done = i;
    }
    put(done, source_size, 0, 0);
    return int(out - reinterpret_cast<uint8_t*>(target));
}
