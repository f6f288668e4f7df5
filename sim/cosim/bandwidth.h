// What the data pins of a memory can carry: every beat costs, and every cycle brings some of that in.
//
// Shared bandwidth: writes are posted to a buffer and drained in batches, as DRAM controllers do,
// since every change of direction costs. Else reads and writes have the full bandwidth each.

#pragma once

#include <algorithm>
#include <cstdint>

#include "harness.h"

namespace moeaccel {

class Bandwidth {
public:
    Bandwidth(const moeaccel_memory_config& config, unsigned beat_bytes)
        : shared_(config.shared_bandwidth), never_refuse_(config.never_refuse),
          turnaround_cycles_(config.turnaround_cycles) {
        // Integers: `cost_` for a beat, `gain_` in every cycle.
        gain_ = int64_t(config.bandwidth_numerator);
        cost_ = int64_t(beat_bytes) * int64_t(config.bandwidth_denominator);
        if (gain_ == 0) gain_ = cost_ = beat_bytes;
        // What is saved while idle buys at most one beat ahead of time, and never at the full rate.
        saved_ = gain_ >= cost_ ? gain_ : cost_ % gain_ == 0 ? cost_ : cost_ + gain_ - 1;
        reset();
    }

    void reset() {
        read_tokens_ = write_tokens_ = saved_;
        buffered_ = 0;
        draining_ = false;
    }

    // A cycle in which the memory works.
    void gain() {
        read_tokens_ = std::min(read_tokens_ + gain_, saved_);
        if (!shared_) write_tokens_ = std::min(write_tokens_ + gain_, saved_);
    }

    bool can_read() const { return !draining_ && read_tokens_ >= cost_; }
    bool can_write() const { return shared_ ? buffered_ < kWriteBuffer : write_tokens_ >= cost_; }

    void read() { read_tokens_ -= cost_; }
    void write() {
        if (never_refuse_) {
            (shared_ ? read_tokens_ : write_tokens_) -= cost_;
        } else if (shared_) {
            ++buffered_;
        } else {
            write_tokens_ -= cost_;
        }
    }

    // Posted writes, before this cycle's read: begin or go on with a batch.
    void drain(bool reads_wait) {
        if (buffered_ == 0) return;
        if (!draining_ && (buffered_ >= kDrainBeats || !reads_wait)) {
            draining_ = true;
            read_tokens_ -= turnaround_cycles_ * gain_;
        }
        if (!draining_) return;
        spend();
        if (buffered_ == 0) {
            draining_ = false;
            read_tokens_ -= turnaround_cycles_ * gain_;
        }
    }

    // And after it: where a turn costs nothing, they take what the read has left.
    void drain_rest() {
        if (turnaround_cycles_ == 0) spend();
    }

private:
    // Beats in the buffer of posted writes, and how many make a batch while reads wait.
    static constexpr uint32_t kWriteBuffer = 64, kDrainBeats = 32;

    void spend() {
        while (buffered_ != 0 && read_tokens_ >= cost_) {
            read_tokens_ -= cost_;
            --buffered_;
        }
    }

    const bool shared_, never_refuse_;
    const int64_t turnaround_cycles_;
    int64_t gain_, cost_, saved_;
    int64_t read_tokens_ = 0, write_tokens_ = 0;  // shared bandwidth is kept in the first
    uint32_t buffered_ = 0;  // beats of posted writes that still cost bandwidth
    bool draining_ = false;
};

}  // namespace moeaccel
