// Put in front of Verilator's own run-time sources: what the model prints or complains about goes to
// the handle it belongs to, and nothing ends the process.

#pragma once

int moeaccel_model_printf(const char* format, ...);

#define VL_PRINTF moeaccel_model_printf
#define VL_USER_FINISH
#define VL_USER_STOP
#define VL_USER_FATAL
