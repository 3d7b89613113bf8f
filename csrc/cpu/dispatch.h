// Which of the compiled instruction sets serves this process.
#pragma once

namespace sage::cpu {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

bool isa_built(int isa);
bool isa_supported(int isa);  // by this machine
int isa();                    // in use: the best that is built and supported, unless set_isa() chose
void set_isa(int isa);        // the caller has checked isa_built and isa_supported

}  // namespace sage::cpu
