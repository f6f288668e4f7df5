// What a master must keep to on a memory port, whatever the memory behind it is like.

#pragma once

#include <cstring>
#include <string>

#include "support.h"

namespace moeaccel {

// An address channel, as it was in the cycle before.
struct Address {
    bool waiting = false;
    uint64_t since = 0;
    uint64_t address = 0;
    uint32_t id = 0, length = 0, size = 0, burst = 0;
    bool operator==(const Address& other) const {
        return address == other.address && id == other.id && length == other.length &&
               size == other.size && burst == other.burst;
    }
};

template <class Data, class Strobe>
class PortChecker {
    static constexpr unsigned kBytes = sizeof(Data);

public:
    PortChecker(std::string name, const moeaccel_memory_config& config, Violations& violations)
        : name_(std::move(name)), written_(config.written), timeout_(config.response_timeout),
          violations_(violations) {}

    void violation(uint64_t cycle, const char* channel, const std::string& text) {
        violations_.add(cycle, name_ + "." + channel, text);
    }

    // While reset is held, the master's valid signals must be low.
    void check_reset(uint64_t cycle, const char* channel, bool valid) {
        if (valid) violation(cycle, channel, std::string(channel) + "VALID is high in reset");
    }

    void check_address(uint64_t cycle, const char* channel, Address& seen, const Address& now,
                       bool valid, bool ready) {
        if (seen.waiting) {
            if (!valid) {
                violation(cycle, channel, "VALID was dropped before READY");
            } else if (!(seen == now)) {
                violation(cycle, channel,
                          "the address or its attributes changed while waiting for READY, from " +
                              hex(seen.address) + " to " + hex(now.address));
            }
        }
        seen = now;
        seen.waiting = valid && !ready;
    }

    void check_burst(uint64_t cycle, const char* channel, const Address& burst, uint64_t last) {
        if ((1u << burst.size) != kBytes) {
            violation(cycle, channel, "SIZE is " + std::to_string(1u << burst.size) +
                                          " bytes, not the bus width of " + std::to_string(kBytes));
        }
        if (burst.burst != 1) {
            violation(cycle, channel, "BURST is " + std::to_string(burst.burst) + ", not INCR (1)");
        }
        if ((burst.address >> 12) != (last >> 12)) {
            violation(cycle, channel, "burst of " + std::to_string(burst.length + 1) +
                                          " beats at " + hex(burst.address) +
                                          " crosses a 4 KiB boundary");
        }
    }

    bool write_data_waits() const { return w_waiting_; }

    void check_write_data(uint64_t cycle, const Data& data, const Strobe& strobe, bool last,
                          bool valid, bool ready) {
        if (w_waiting_) {
            if (!valid) {
                violation(cycle, "W", "VALID was dropped before READY");
            } else if (std::memcmp(&w_data_, &data, sizeof data) != 0 ||
                       std::memcmp(&w_strobe_, &strobe, sizeof strobe) != 0 || w_last_ != last) {
                violation(cycle, "W", "data, strobes or WLAST changed while waiting for READY");
            }
        }
        w_waiting_ = valid && !ready;
        if (w_waiting_) {
            w_data_ = data;
            w_strobe_ = strobe;
            w_last_ = last;
        }
    }

    void check_patience(uint64_t cycle, uint64_t since, const char* channel, const char* what) {
        if (timeout_ != 0 && cycle - since == timeout_) {
            violation(cycle, channel, std::string("nothing for ") + std::to_string(timeout_) +
                                          " cycles from " + what);
        }
    }

    // Forget what was offered.
    void reset() { w_waiting_ = false; }

    // -- memory that nobody wrote ----------------------------------------------------------------

    void check_written(uint64_t cycle, uint64_t address) {
        if (written_ == nullptr) return;
        for (uint64_t block = address / kBlock; block <= (address + kBytes - 1) / kBlock; ++block) {
            if (written_[block] == 0)
                violation(cycle, "R", "read of " + hex(address) + ", which nobody wrote");
        }
    }

    // `written` has one entry for a block: a burst that writes a part of one says too much.
    void check_whole_blocks(uint64_t cycle, uint64_t address, uint64_t last) {
        if (written_ != nullptr && (address % kBlock || (last + 1) % kBlock))
            violation(cycle, "AW", "write of a part of " + std::to_string(kBlock) + " bytes, at " +
                                       hex(address));
    }

    void mark_written(uint64_t address, const Strobe& strobe) {
        if (written_ == nullptr) return;
        const Strobe none{};
        if (std::memcmp(&strobe, &none, sizeof none) == 0) return;
        for (uint64_t block = address / kBlock; block <= (address + kBytes - 1) / kBlock; ++block)
            written_[block] = 1;
    }

private:
    // Bytes of which `written` has an entry.
    static constexpr uint64_t kBlock = MOEACCEL_WRITTEN_BYTES;

    const std::string name_;
    uint8_t* const written_;
    const uint32_t timeout_;
    Violations& violations_;
    bool w_waiting_ = false, w_last_ = false;
    Data w_data_{};
    Strobe w_strobe_{};
};

}  // namespace moeaccel
