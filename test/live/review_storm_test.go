package live

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tidemark/internal/testkit"
	"tidemark/internal/testkit/program"
)

// TestKillStorm: storms of kill -9, also of daemons that have just begun, over
// three disks with a ring that cannot hold the load. After each storm the vault
// is what the disks hold, and every point keeps the order.
func TestKillStorm(t *testing.T) {
	eachSeed(t, func(t *testing.T, rng *rand.Rand) {
		extra := testkit.NewDisk(t, orderDisk)
		ring := fmt.Sprintf("%dK", 64<<rng.IntN(5))
		o := newOrder(t, rng, 32<<10, "--ring-size", ring, "--seal-every", "20ms", "--segment-size", "128K", extra.Path)
		o.names, o.others = o.names[1:], 1
		o.noise = append(o.noise, noise{open(t, extra.Path, unix.O_DIRECT), 0, orderDisk / 2}, noise{open(t, extra.Path, 0), orderDisk / 2, orderDisk})
		for round := range 1 {
			o.write(func() {
				for range 4 {
					o.counted(rng.Uint64N(200))
					if rng.IntN(3) == 0 {
						_ = o.bookmark() // refused inside a gap
					}
					o.d.Kill()
					for range rng.IntN(3) {
						o.shortLived(time.Duration(rng.IntN(300)) * time.Millisecond)
						o.counted(rng.Uint64N(20))
					}
					o.d.Start()
				}
			})
			o.d.Settle("g")
			o.d.Run("verify", "--vault", o.d.Vault, "--live")
			if err := o.bookmark(); err != nil {
				t.Error(err)
			}
			o.calm()
			t.Logf("round %d, ring %s: %d stretches", round, ring, len(stretches(t, o.d, "g")))
		}
		identical(t, o.d, "g")
		o.everywhere()
		o.d.Run("verify", "--vault", o.d.Vault)
	})
}

// shortLived runs a daemon that is killed after a moment, ready or not.
func (o *order) shortLived(life time.Duration) {
	o.t.Helper()
	cmd := exec.Command(program.Binary(o.t), "daemon", "--state", o.d.State)
	cmd.Env = append(os.Environ(), "TIDEMARK_SOCKET="+filepath.Join(o.d.Dir, "socket"))
	if err := cmd.Start(); err != nil {
		o.t.Fatal(err)
	}
	time.Sleep(life)
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed
}
