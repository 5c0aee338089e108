package nbd

import (
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"

	"tidemark/internal/abi/nbd"
)

// BenchmarkRead reads 4 KiB and 1 MiB over a unix socket, so many at one time.
func BenchmarkRead(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20} {
		for _, depth := range []int{1, 32} {
			b.Run(fmt.Sprintf("%dk-%d", size>>10, depth), func(b *testing.B) { benchmarkRead(b, size, depth) })
		}
	}
}

func benchmarkRead(b *testing.B, size, depth int) {
	disk := newMemory(32 << 20)
	for i := range disk.b {
		disk.b[i] = 1
	}
	path := filepath.Join(b.TempDir(), "s")
	serveAt(b, "nbd+unix:///x?socket="+path, server(b, Export{Name: "x", Device: disk}))
	c := greet(b, &net.UnixAddr{Name: path, Net: "unix"})
	c.send("IHAVEOPT", uint32(nbd.OptExportName), uint32(1), "x")
	c.recv(10)
	b.SetBytes(int64(size))
	slots := make(chan struct{}, depth)
	b.ResetTimer()
	go func() {
		for i := range b.N {
			slots <- struct{}{}
			h := header(nbd.CmdRead, uint32(size))
			be.PutUint64(h[16:], uint64(i*size%len(disk.b)))
			if _, err := c.conn.Write(h); err != nil {
				return
			}
		}
	}()
	reply := make([]byte, 16+size)
	for range b.N {
		if _, err := io.ReadFull(c.conn, reply); err != nil {
			b.Fatal(err)
		}
		<-slots
	}
}
