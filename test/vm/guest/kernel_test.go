//go:build guest

package guest

import (
	"testing"

	"tidemark/internal/testkit"
)

func TestCapable(t *testing.T) {
	testkit.Need(t, "root", "tap", "loop", "fuse", "dm")
}
