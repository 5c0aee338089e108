//go:build steps

package main

import (
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// step does at the steps of a mark over groups what the environment says, for
// tests: "kill@STEP" ends the process there as kill -9 does, to see what the next
// daemon makes of it; "slow@STEP" widens the windows in which races happen.
func step(step string) {
	wanted := strings.Split(os.Getenv("TIDEMARK_TEST_STEPS"), ",")
	switch {
	case slices.Contains(wanted, "kill@"+step):
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case slices.Contains(wanted, "slow@"+step):
		time.Sleep(rand.N(50 * time.Millisecond))
	}
}
