package vault

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strings"

	"gocloud.dev/blob"

	"tidemark/internal/segment"
)

const (
	markerName    = "tidemark-vault"
	markerVersion = 1
)

// marker makes a place a vault. Its bytes are exactly what encode gives, so
// that any change is seen.
type marker struct {
	Version int    `json:"version"`
	Flags   uint32 `json:"flags"` // what a reader must understand; none are defined
	ID      string `json:"id"`    // random, 32 hexadecimal digits
	CRC32C  uint32 `json:"crc32c"`
}

func newMarker() marker {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	m := marker{Version: markerVersion, ID: hex.EncodeToString(id[:])}
	m.CRC32C = m.sum()
	return m
}

// sum is the checksum of the text "tidemark-vault VERSION FLAGS ID".
func (m marker) sum() uint32 {
	return checksum(fmt.Appendf(nil, "%s %d %d %s", markerName, m.Version, m.Flags, m.ID))
}

func checksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

func (m marker) encode() []byte {
	b, _ := json.Marshal(m) // of these fields it cannot fail
	return append(b, '\n')
}

func isTemporaryMarker(name string) bool {
	return strings.HasPrefix(name, markerName+".") && strings.HasSuffix(name, temporary)
}

func (v *Vault) readMarker(ctx context.Context) (marker, error) {
	var m marker
	b, err := v.bucket.ReadAll(ctx, markerName)
	switch {
	case notFound(err):
		return m, fmt.Errorf("%s is %w: give the folder that tidemark protect was given with --vault, or let protect make one", v.where, ErrNotVault)
	case err != nil:
		return m, unreachable(err)
	}
	if err := json.Unmarshal(b, &m); err != nil || m.CRC32C != m.sum() || !bytes.Equal(b, m.encode()) {
		return m, fmt.Errorf("%s: the marker %s is %w: put it back from a copy; the segments do not depend on it", v.where, markerName, segment.ErrDamaged)
	}
	if m.Version != markerVersion || m.Flags != 0 {
		return m, fmt.Errorf("%s is a vault of version %d with flags %#x, this build reads version %d: %w", v.where, m.Version, m.Flags, markerVersion, segment.ErrVersion)
	}
	return m, nil
}

// writeMarker makes the place a vault. Where another process was faster its
// marker stays.
func writeMarker(ctx context.Context, b *blob.Bucket) error {
	err := b.WriteAll(ctx, markerName, newMarker().encode(), &blob.WriterOptions{ContentType: contentType, IfNotExist: true})
	if exists(err) {
		return nil
	}
	return unreachable(err)
}
