// Small pieces shared by the models of the two buses.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "harness.h"

namespace moeaccel {

// xorshift64*: short, fast, and the same everywhere.
class Random {
public:
    explicit Random(uint64_t seed = 1) : state_(seed * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u) {
        if (state_ == 0) state_ = 1;
        for (int i = 0; i < 8; ++i) next();
    }
    uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545F4914F6CDD1Du;
    }
    // Uniform in [0, bound), from the better high bits.
    uint32_t below(uint32_t bound) { return uint32_t(((next() >> 32) * bound) >> 32); }

private:
    uint64_t state_;
};

// The stalls of one channel.
class Stall {
public:
    Stall() = default;
    Stall(uint32_t threshold, uint32_t length) : threshold_(threshold), length_(length) {}
    bool enabled() const { return threshold_ != 0; }
    // To be asked once in every cycle.
    bool blocked(Random& random) {
        if (left_ != 0) {
            --left_;
            return true;
        }
        if ((random.next() >> 48) >= threshold_) return false;
        left_ = length_ > 1 ? random.below(length_) : 0;
        return true;
    }

private:
    uint32_t threshold_ = 0, length_ = 1, left_ = 0;
};

// A queue that also gives up elements from its middle.
template <class T>
class Queue {
public:
    bool empty() const { return size_ == 0; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return items_[(head_ + i) & (items_.size() - 1)]; }
    void push(T item) {
        if (size_ == items_.size()) grow();
        (*this)[size_++] = std::move(item);
    }
    void erase(size_t index) {
        for (size_t i = index; i > 0; --i) (*this)[i] = std::move((*this)[i - 1]);
        head_ = (head_ + 1) & (items_.size() - 1);
        --size_;
    }
    void clear() { head_ = size_ = 0; }

private:
    void grow() {
        std::vector<T> larger(items_.size() * 2);
        for (size_t i = 0; i < size_; ++i) larger[i] = std::move((*this)[i]);
        items_ = std::move(larger);
        head_ = 0;
    }
    std::vector<T> items_ = std::vector<T>(16);
    size_t head_ = 0, size_ = 0;
};

struct Violation {
    uint64_t cycle;
    std::string channel;
    std::string text;
};

class Violations {
public:
    void add(uint64_t cycle, const std::string& channel, const std::string& text) {
        ++count_;
        if (kept_.size() < kKept) kept_.push_back({cycle, channel, text});
    }
    uint64_t count() const { return count_; }
    const std::vector<Violation>& kept() const { return kept_; }
    void clear() {
        count_ = 0;
        kept_.clear();
    }

private:
    static constexpr size_t kKept = 256;
    uint64_t count_ = 0;
    std::vector<Violation> kept_;
};

inline std::string hex(uint64_t value) {
    static const char digits[] = "0123456789abcdef";
    std::string text;
    do {
        text.insert(text.begin(), digits[value & 15]);
        value >>= 4;
    } while (value != 0);
    return "0x" + text;
}

}  // namespace moeaccel
