package sim

import (
	"os"
	"strconv"
)

// Seeds is how many seeds a test tries, counted from 0: n, or what TIDEMARK_SEEDS says.
func Seeds(n uint64) uint64 {
	if more, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEEDS"), 10, 64); err == nil {
		return more
	}
	return n
}
