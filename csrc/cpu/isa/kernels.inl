// Every vector kernel; compiled once per instruction set.
#include "../simd.h"
