package nbd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/internal/abi/nbd"
	"tidemark/internal/testkit"
)

// log collects what a server says.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// take gives what was said since it was asked last.
func (l *log) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

// wait gives what was said when that includes some words, or after 10 seconds.
func (l *log) wait(words string) (all string) {
	for range 1000 {
		if all += l.take(); strings.Contains(all, words) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return all
}

// tlsServer serves a device with TLS. ca signed its certificate, and says who may use it.
func tlsServer(t *testing.T, scheme string, d *file) (uri, dir string, ca *authority, said *log) {
	t.Helper()
	dir, ca, said = t.TempDir(), newAuthority(t, "the CA"), &log{}
	ca.publish(dir)
	ca.issue(dir, "server", x509.ExtKeyUsageServerAuth)
	s := server(t, Export{Name: "disk", Device: d})
	s.Log = slog.New(slog.NewTextHandler(said, nil))
	at := "nbds://127.0.0.1:0/disk?"
	if scheme == "nbds+unix" {
		at = "nbds+unix:///disk?socket=" + filepath.Join(t.TempDir(), "s") + "&"
	}
	return serveAt(t, at+"tls-certificates="+dir, s), dir, ca, said
}

// as gives the URI with another folder of certificates.
func as(uri, dir string) string {
	return uri[:strings.Index(uri, "tls-certificates=")] + "tls-certificates=" + dir
}

// qemu gives the arguments with which qemu-img reads a URI of nbds with certificates.
func qemu(t *testing.T, uri, dir string) []string {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprintf("server.type=inet,server.host=%s,server.port=%s", u.Hostname(), u.Port())
	if path := u.Query().Get("socket"); path != "" {
		at = "tls-hostname=localhost,server.type=unix,server.path=" + path
	}
	args := []string{"--image-opts", "driver=nbd,export=disk," + at}
	if dir != "" {
		args[1] += ",tls-creds=tls0"
		args = append([]string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + dir}, args...)
	}
	return args
}

func TestTLSClients(t *testing.T) {
	testkit.Need(t, "nbdclients")
	for _, scheme := range []string{"nbds", "nbds+unix"} {
		t.Run(strings.ReplaceAll(scheme, "+", "-"), func(t *testing.T) {
			d := device(t, 4<<20)
			uri, _, ca, said := tlsServer(t, scheme, d)
			dir := t.TempDir()
			ca.publish(dir)
			ca.issue(dir, "client", x509.ExtKeyUsageClientAuth)
			if out := testkit.Run(t, "nbdinfo", as(uri, dir)); !strings.Contains(out, "with TLS") || !strings.Contains(out, "export-size: 4194304") {
				t.Errorf("nbdinfo:\n%s", out)
			}
			copied := filepath.Join(t.TempDir(), "copy")
			testkit.Run(t, "nbdcopy", "--connections=4", as(uri, dir), copied)
			same(t, copied, d)
			other := device(t, 4<<20)
			testkit.Run(t, "nbdcopy", "--connections=2", other.Name(), as(uri, dir))
			same(t, other.Name(), d)
			converted := filepath.Join(t.TempDir(), "converted")
			testkit.Run(t, "qemu-img", append(append([]string{"convert", "-O", "raw"}, qemu(t, uri, dir)...), converted)...)
			same(t, converted, d)
			if s := said.take(); s != "" {
				t.Errorf("the server said %s", s)
			}
		})
	}
}

// TestTLSRefused: who must not be served is not, and both sides say why.
func TestTLSRefused(t *testing.T) {
	testkit.Need(t, "nbdclients")
	d := device(t, 1<<20)
	uri, dir, ca, said := tlsServer(t, "nbds", d)
	folder := func(with *authority, trusts *authority) (string, string) {
		dir := t.TempDir()
		trusts.publish(dir)
		if with != nil {
			with.issue(dir, "client", x509.ExtKeyUsageClientAuth)
		}
		return as(uri, dir), dir
	}
	stranger := newAuthority(t, "a stranger")
	good, goodDir := folder(ca, ca)
	plain := strings.Replace(uri[:strings.Index(uri, "?")], "nbds://", "nbd://", 1)
	revoked := t.TempDir()
	ca.publish(revoked)
	ca.revoke(dir, ca.issue(revoked, "client", x509.ExtKeyUsageClientAuth))
	wrong, wrongDir := folder(stranger, ca)
	none, noneDir := folder(nil, ca)
	distrust, distrustDir := folder(ca, stranger)
	both := func(dir string) { // qemu looks at its own certificate, and must find a CA for it
		ours, _ := os.ReadFile(filepath.Join(dir, caFile))
		more := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: stranger.cert.Raw})
		if err := os.WriteFile(filepath.Join(dir, caFile), append(ours, more...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	both(wrongDir)
	for _, c := range []struct {
		what, uri, dir           string
		nbdinfo, qemuImg, server string // what they say, in part
	}{
		{"wrong CA", wrong, wrongDir, "Operation not supported", "no client certificate that the CA", "no client certificate that the CA"},
		{"no certificate", none, noneDir, "Operation not supported", "no client certificate that the CA", "no client certificate that the CA"},
		{"revoked", as(uri, revoked), revoked, "Operation not supported", "is revoked", "is revoked"},
		{"no TLS", plain, "", "without TLS", "Did you forget a valid tls-creds", "has to speak TLS first"},
		{"the client trusts another CA", distrust, distrustDir, "certificate verification", "", "if it does not trust this server"},
	} {
		for cmd, want := range map[string]string{"nbdinfo": c.nbdinfo, "qemu-img": c.qemuImg} {
			args := []string{c.uri}
			if cmd == "qemu-img" {
				args = append([]string{"info"}, qemu(t, uri, c.dir)...)
			}
			if want == "" {
				continue // it finds the fault before it connects
			}
			out, err := exec.Command(cmd, args...).CombinedOutput()
			why := said.wait(c.server)
			t.Logf("%s, %s: the client says %q, the server %q", c.what, cmd, out, why)
			if err == nil {
				t.Errorf("%s: %s was served:\n%s", c.what, cmd, out)
			}
			if !strings.Contains(string(out), want) || !strings.Contains(why, c.server) {
				t.Errorf("%s: %s says %q, the server %q", c.what, cmd, out, why)
			}
		}
	}
	testkit.Run(t, "nbdinfo", good) // was good all the time
	testkit.Run(t, "qemu-img", append([]string{"info"}, qemu(t, uri, goodDir)...)...)
	plainURI := serve(t, Export{Name: "disk", Device: d})
	withTLS := strings.Replace(plainURI, "nbd+unix", "nbds+unix", 1) + "&tls-certificates=" + goodDir
	if out, err := exec.Command("env", "LIBNBD_DEBUG=1", "nbdinfo", withTLS).CombinedOutput(); err == nil || !strings.Contains(string(out), "TLS") {
		t.Errorf("TLS to a server that has none: %v %s", err, out)
	}
}

// TestForcedTLS: before TLS every option but the one for it is refused, and nothing that
// was said in the clear counts afterwards.
func TestForcedTLS(t *testing.T) {
	uri, _, ca, said := tlsServer(t, "nbds+unix", device(t, 1<<20))
	at := &net.UnixAddr{Name: strings.TrimSuffix(uri[strings.Index(uri, "socket=")+7:], uri[strings.Index(uri, "&"):]), Net: "unix"}
	c := greet(t, at)
	for _, opt := range []uint32{nbd.OptList, nbd.OptInfo, nbd.OptGo, nbd.OptStructured, nbd.OptListMeta, nbd.OptSetMeta, 4711} {
		all := c.option(opt, "")
		if last(all) != nbd.RepErrTLSReqd || !strings.Contains(string(all[0].data), "nbds") {
			t.Errorf("option %d in the clear: %#x %s", opt, last(all), all[0].data)
		}
	}
	if k := last(c.option(nbd.OptStartTLS, "x")); k != nbd.RepErrInvalid {
		t.Errorf("STARTTLS with data: %#x", k)
	}
	c.send("IHAVEOPT", uint32(nbd.OptExportName), uint32(4), "disk")
	c.closed()
	if s := said.wait("may not"); !strings.Contains(s, "asks for an export") {
		t.Errorf("the server says %q", s)
	}

	inject := greet(t, at) // one write, so that both arrive together
	inject.send("IHAVEOPT", uint32(nbd.OptStartTLS), uint32(0), "IHAVEOPT", uint32(nbd.OptStructured), uint32(0))
	inject.closed()
	if s := said.wait("in the clear"); !strings.Contains(s, "in the clear") {
		t.Errorf("the server says %q", s)
	}

	dir := t.TempDir()
	ca.issue(dir, "client", x509.ExtKeyUsageClientAuth)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	c = greet(t, at)
	if k := last(c.option(nbd.OptStartTLS, "")); k != nbd.RepAck {
		t.Fatalf("STARTTLS: %#x", k)
	}
	secure := tls.Client(c.conn, &tls.Config{RootCAs: pool, ServerName: "localhost", Certificates: []tls.Certificate{pair}})
	c.conn = secure
	if k := last(c.option(nbd.OptStartTLS, "")); k != nbd.RepErrInvalid {
		t.Errorf("STARTTLS in TLS: %#x", k)
	}
	c.enter("disk")
	c.works()
	c.request(0, nbd.CmdRead, 5, 0, 1<<20)
	if b, ok := c.answer(5).whole(0, 1<<20); !ok || len(b) != 1<<20 {
		t.Error("a long read in TLS")
	}
	c.request(0, nbd.CmdDisc, 6, 0, 0)
	if n, err := io.Copy(io.Discard, c.conn); n != 0 || err != nil { // a proper end: close_notify
		t.Errorf("after the end: %d bytes, %v", n, err)
	}
}

// TestTLSHangs: a client that begins with TLS and goes no further is let go of.
func TestTLSHangs(t *testing.T) {
	uri, _, _, _ := tlsServer(t, "nbds+unix", device(t, 1<<20))
	_, rest, _ := strings.Cut(uri, "socket=")
	path, _, _ := strings.Cut(rest, "&")
	for range 5 { // the server's end, checked by serveAt, must not wait for them
		c := greet(t, &net.UnixAddr{Name: path, Net: "unix"})
		c.option(nbd.OptStartTLS, "")
		c.send("\x16\x03\x01\x02\x00\x01")
	}
}

func TestCertificateFolder(t *testing.T) {
	dir, ca, other := t.TempDir(), newAuthority(t, "a"), newAuthority(t, "b")
	missing := func(what string) {
		t.Helper()
		if _, err := LoadTLS(dir); !errors.Is(err, ErrCertificates) || !strings.Contains(err.Error(), what) {
			t.Errorf("%v; want a word about %s", err, what)
		}
	}
	missing(certFile)
	ca.issue(dir, "server", x509.ExtKeyUsageServerAuth)
	missing(caFile)
	if err := os.WriteFile(filepath.Join(dir, caFile), []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing(caFile)
	ca.publish(dir)
	if _, err := LoadTLS(dir); err != nil {
		t.Error(err)
	}
	other.revoke(dir)
	missing(crlFile)
	if err := os.WriteFile(filepath.Join(dir, crlFile), []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing(crlFile)
}
