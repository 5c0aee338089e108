package serve

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"tidemark/internal/filter/delay"
	"tidemark/internal/snapshot"
	"tidemark/internal/stack"
)

// access is one request of a client to one sector, and what it gave.
type access struct {
	sector int
	write  bool
	value  byte // written; 0 by zeroing
}

// sectorModel is a sector: it holds what was written last.
var sectorModel = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		by := map[int][]porcupine.Operation{}
		for _, o := range all {
			by[o.Input.(access).sector] = append(by[o.Input.(access).sector], o)
		}
		var out [][]porcupine.Operation
		for _, ops := range by {
			out = append(out, ops)
		}
		return out
	},
	Init: func() any { return byte(0) },
	Step: func(state, input, output any) (bool, any) {
		if a := input.(access); a.write {
			return true, a.value
		}
		return output.(byte) == state.(byte), state
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v %v", input, output) },
}

// TestLinearizable: a served device is one disk to all its clients: each request
// takes effect at one moment between its beginning and its end, while filters come
// and go, while a snapshot is taken and held.
func TestLinearizable(t *testing.T) {
	rounds := 3
	if n, err := strconv.Atoi(os.Getenv("TIDEMARK_SEEDS")); err == nil {
		rounds = n
	}
	for i := range rounds {
		seed := rand.Uint64()
		if n, err := strconv.ParseUint(os.Getenv("TIDEMARK_SEED"), 10, 64); err == nil {
			seed = n
		}
		t.Run(fmt.Sprint(i), func(t *testing.T) { linearizable(t, seed) })
	}
}

func linearizable(t *testing.T, seed uint64) {
	const clients, sectors, requests = 6, 5, 150
	env := newEnv(t)
	s := open(t, env)
	uri := create(t, s, Spec{Name: "data", Backing: imageFile(t, 4*mib), Front: FrontNBDServer}).Node
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("again with: TIDEMARK_SEED=%d go test -run TestLinearizable ./internal/serve", seed)
		}
	})
	start := time.Now()
	all := make([][]porcupine.Operation, clients)
	var load sync.WaitGroup
	defer load.Wait()
	for n := range clients {
		rng := rand.New(rand.NewPCG(seed, uint64(n)))
		c := dial(t, uri)
		load.Go(func() {
			defer c.Close()
			for i := range requests {
				// Values are a client's own, 1 to 250, so that what is read tells who wrote it.
				a := access{sector: rng.IntN(sectors), write: rng.IntN(2) == 0}
				if a.write && rng.IntN(6) > 0 {
					a.value = byte(1 + n + clients*(i%41))
				}
				called := time.Since(start)
				got, err := c.do(a)
				if err != nil {
					t.Errorf("client %d, %+v: %v", n, a, err)
					return
				}
				all[n] = append(all[n], porcupine.Operation{ClientId: n, Input: a, Output: got, Call: int64(called), Return: int64(time.Since(start))})
			}
		})
	}
	disturb(t, s, rand.New(rand.NewPCG(seed, 99)))
	load.Wait()
	for deadline := time.Now().Add(time.Minute); len(s.InUse()) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the clients are gone, and the device is in use")
		}
	}
	var history []porcupine.Operation
	for _, ops := range all {
		history = append(history, ops...)
	}
	result, info := porcupine.CheckOperationsVerbose(sectorModel, history, 30*time.Second)
	if result == porcupine.Illegal {
		path := filepath.Join(os.TempDir(), fmt.Sprintf("tidemark-history-%d.html", seed))
		_ = porcupine.VisualizePath(sectorModel, info, path) // a help, no more
		t.Errorf("not linearizable, see %s", path)
	}
}

// disturb has filters come and go and takes a snapshot, all beside the load.
func disturb(t *testing.T, s *Server, rng *rand.Rand) {
	t.Helper()
	storage := snapshot.Storage{Path: filepath.Join(t.TempDir(), "diff"), Limit: 8 * mib}
	_, id := snapshotOf(t, s, snapshot.Request{Devices: []string{"data"}, Storage: []snapshot.Storage{storage}})
	wait := func(r *stack.Request) time.Duration { return time.Duration(r.Range.Off%7) * 10 * time.Microsecond }
	for i := range 6 {
		name := fmt.Sprint("delay-", i)
		// Odd altitudes: a device's own filters have even ones.
		if err := s.system.Register(name, 1+2*rng.IntN(450), delay.Driver(wait)); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			if err := s.TakeSnapshot(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.system.Unregister(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.DestroySnapshot(context.Background(), id); err != nil {
		t.Fatal(err)
	}
}

// The protocol's numbers, as its specification has them.
const (
	handshakeFlags = 3 // fixed newstyle, no zeroes
	optionMagic    = 0x49484156454f5054
	optExportName  = 1
	requestMagic   = 0x25609513
	cmdRead        = 0
	cmdWrite       = 1
	cmdWriteZeroes = 6
)

// nbdClient speaks just enough NBD: sectors, one request at a time, simple replies.
type nbdClient struct{ net.Conn }

func dial(t *testing.T, uri string) *nbdClient {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", u.Query().Get("socket"))
	if err != nil {
		t.Fatal(err)
	}
	c := &nbdClient{conn}
	t.Cleanup(func() { c.Close() })
	hello := make([]byte, 18)
	name := u.Path[1:]
	say := binary.BigEndian.AppendUint32(nil, handshakeFlags)
	say = binary.BigEndian.AppendUint64(say, optionMagic)
	say = binary.BigEndian.AppendUint32(say, optExportName)
	say = append(binary.BigEndian.AppendUint32(say, uint32(len(name))), name...)
	if _, err := io.ReadFull(c, hello); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(say); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, hello[:10]); err != nil {
		t.Fatal(err)
	}
	return c
}

const sector = 512

// do gives the value that was read.
func (c *nbdClient) do(a access) (byte, error) {
	cmd := cmdRead
	var payload []byte
	switch {
	case a.write && a.value == 0:
		cmd = cmdWriteZeroes
	case a.write:
		cmd = cmdWrite
		payload = make([]byte, sector)
		for i := range payload {
			payload[i] = a.value
		}
	}
	say := binary.BigEndian.AppendUint32(nil, requestMagic)
	say = binary.BigEndian.AppendUint32(say, uint32(cmd))
	say = binary.BigEndian.AppendUint64(say, 7)
	say = binary.BigEndian.AppendUint64(say, uint64(a.sector*sector))
	say = binary.BigEndian.AppendUint32(say, sector)
	if _, err := c.Write(append(say, payload...)); err != nil {
		return 0, err
	}
	reply := make([]byte, 16+sector)
	if cmd != cmdRead {
		reply = reply[:16]
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(c, reply); err != nil {
		return 0, err
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return 0, fmt.Errorf("error %d", code)
	}
	if cmd == cmdRead {
		return reply[16+sector/2], nil
	}
	return 0, nil
}
