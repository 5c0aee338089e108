package nbd

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestLimitsAreDocumented: docs/nbd.md says the limits that hold.
func TestLimitsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/nbd.md")
	if err != nil {
		t.Fatal(err)
	}
	mib := func(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }
	sec := func(d time.Duration) string { return fmt.Sprintf("%.0f s", d.Seconds()) }
	for what, value := range map[string]string{
		"connections": fmt.Sprint(connectionMax), "payload of one request": mib(payloadMax),
		"memory for requests of one connection": mib(clientMemory), "memory for requests of all connections": mib(serverMemory),
		"requests of one connection at one time": fmt.Sprint(workers), "options in one handshake": fmt.Sprint(optionsMax),
		"one option": fmt.Sprintf("%d KiB", optionMax>>10), "the handshake, TLS included": sec(handshakeTime),
		"the next MiB of a payload or reply, or its rest": sec(stallTime), "extents of one context in one answer": fmt.Sprint(statusMax),
		"contexts of one connection": fmt.Sprint(contextsMax), "a name or description": fmt.Sprintf("%d bytes", nameMax),
		"replies after the server was told to end": sec(drainTime),
	} {
		if row := fmt.Sprintf("\n| %s | %s |", what, value); !strings.Contains(string(doc), row) {
			t.Errorf("no row%s", row)
		}
	}
}
