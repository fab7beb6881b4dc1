// Which instruction set serves: the best that the machine runs and this build has, or the one that HALFBYTE_ISA names.
#pragma once
#include <string>
#include <vector>

#include "isa.h"

namespace halfbyte {

std::vector<const Isa*> isas();  // those that this machine runs, the best first
const Isa& isa();                // the one in use
void use_isa(const std::string& name);  // throws std::invalid_argument for one that does not run here

}  // namespace halfbyte
