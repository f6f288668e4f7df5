// The AXI4-Lite master behind register accesses, and a checker of the slave that answers.
//
// One transaction at a time. Address and data of a write are offered together, or apart where
// stalls are asked for. The same sample() and drive() discipline as the memory ports.

#pragma once

#include "support.h"

namespace moeaccel {

template <class Pins>
class RegisterPort {
public:
    RegisterPort(Pins pins, const moeaccel_register_config& config, Violations& violations)
        : pins_(pins), violations_(violations), random_(config.seed) {
        for (int i = 0; i < MOEACCEL_CHANNELS; ++i) {
            stall_[i] = Stall(config.stall[i], config.stall_length);
        }
        reset();
    }

    void reset() {
        state_ = kIdle;
        for (Offer* offer : {&address_, &data_}) *offer = Offer{};
        awaiting_b_ = awaiting_r_ = b_seen_ = r_seen_ = false;
        pins_.awvalid() = pins_.wvalid() = pins_.arvalid() = 0;
        pins_.bready() = pins_.rready() = 0;
    }

    void start_read(uint32_t address) {
        pins_.araddr() = address;
        state_ = kReading;
        address_ = Offer{true, false};
        awaiting_r_ = true;
    }

    void start_write(uint32_t address, uint32_t value, uint32_t strobe) {
        pins_.awaddr() = address;
        pins_.wdata() = value;
        pins_.wstrb() = strobe;
        state_ = kWriting;
        address_ = data_ = Offer{true, false};
        awaiting_b_ = true;
    }

    bool busy() const { return state_ != kIdle; }
    uint32_t value() const { return value_; }
    uint32_t response() const { return response_; }

    void sample(uint64_t cycle) {
        if (state_ == kIdle) {
            if (pins_.bvalid()) violation(cycle, "B", "BVALID without a write");
            if (pins_.rvalid()) violation(cycle, "R", "RVALID without a read");
            return;
        }
        const bool answerable = !address_.pending && !data_.pending;
        if (state_ == kReading) {
            if (address_.valid && pins_.arready()) address_ = Offer{};
            sample_r(cycle, answerable);
        } else {
            if (address_.valid && pins_.awready()) address_ = Offer{};
            if (data_.valid && pins_.wready()) data_ = Offer{};
            sample_b(cycle, answerable);
        }
    }

    void drive() {
        if (state_ == kIdle) {
            pins_.awvalid() = pins_.wvalid() = pins_.arvalid() = 0;
            pins_.bready() = pins_.rready() = 0;
            return;
        }
        const bool reading = state_ == kReading;
        raise(address_, reading ? MOEACCEL_AR : MOEACCEL_AW);
        raise(data_, MOEACCEL_W);
        pins_.arvalid() = reading && address_.valid;
        pins_.awvalid() = !reading && address_.valid;
        pins_.wvalid() = data_.valid;
        pins_.rready() = awaiting_r_ && !stall_[MOEACCEL_R].blocked(random_);
        pins_.bready() = awaiting_b_ && !stall_[MOEACCEL_B].blocked(random_);
    }

private:
    enum State { kIdle, kReading, kWriting };

    struct Offer {
        bool pending = false;  // not yet accepted
        bool valid = false;
    };

    // Once valid, always valid until accepted.
    void raise(Offer& offer, int channel) {
        if (offer.pending && !offer.valid) offer.valid = !stall_[channel].blocked(random_);
    }

    void violation(uint64_t cycle, const char* channel, const std::string& text) {
        violations_.add(cycle, std::string("axil.") + channel, text);
    }

    void sample_r(uint64_t cycle, bool answerable) {
        const bool valid = pins_.rvalid();
        if (valid && !answerable) violation(cycle, "R", "RVALID before the address was accepted");
        if (r_seen_) {
            if (!valid) {
                violation(cycle, "R", "VALID was dropped before READY");
            } else if (value_ != pins_.rdata() || response_ != pins_.rresp()) {
                violation(cycle, "R", "data or response changed while waiting for READY");
            }
        }
        r_seen_ = valid;
        if (!valid) return;
        value_ = pins_.rdata();
        response_ = pins_.rresp();
        if (pins_.rready()) {
            r_seen_ = awaiting_r_ = false;
            finish();
        }
    }

    void sample_b(uint64_t cycle, bool answerable) {
        const bool valid = pins_.bvalid();
        if (valid && !answerable) {
            violation(cycle, "B", "BVALID before address and data were accepted");
        }
        if (b_seen_) {
            if (!valid) {
                violation(cycle, "B", "VALID was dropped before READY");
            } else if (response_ != pins_.bresp()) {
                violation(cycle, "B", "the response changed while waiting for READY");
            }
        }
        b_seen_ = valid;
        if (!valid) return;
        response_ = pins_.bresp();
        if (pins_.bready()) {
            b_seen_ = awaiting_b_ = false;
            finish();
        }
    }

    void finish() {
        state_ = kIdle;
        address_ = data_ = Offer{};
    }

    Pins pins_;
    Violations& violations_;
    Random random_;
    Stall stall_[MOEACCEL_CHANNELS];
    State state_ = kIdle;
    Offer address_, data_;
    bool awaiting_b_ = false, awaiting_r_ = false, b_seen_ = false, r_seen_ = false;
    uint32_t value_ = 0, response_ = 0;
};

}  // namespace moeaccel
