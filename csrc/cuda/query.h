#pragma once
#include <string>

namespace sage::cuda {

std::string versions();           // of the runtime built in, and of the driver
std::string problem(int device);  // why no kernel of this build runs there; empty if they do

}  // namespace sage::cuda
