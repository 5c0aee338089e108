package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrURI: not a place where this server listens.
var ErrURI = errors.New("not an NBD URI to serve at")

// ErrSocketInUse: another server answers there.
var ErrSocketInUse = errors.New("the socket is in use")

const (
	defaultPort   = "10809"
	socketPathMax = len(syscall.RawSockaddrUnix{}.Path) - 1 // the name ends with a zero byte
	forms         = "want nbd://127.0.0.1:PORT/NAME, nbd+unix:///NAME?socket=PATH, nbds://HOST:PORT/NAME?tls-certificates=DIR or nbds+unix:///NAME?socket=PATH&tls-certificates=DIR"
)

// Listener is a place to serve at.
type Listener struct {
	net.Listener
	Export string // the name in the URI
	URI    string // with the port that it got, where that was left to the kernel (port 0)
	TLS    *TLS   // clients must begin with TLS; nil: they cannot
}

// Listen listens where an NBD URI says:
//
//	nbd://127.0.0.1:PORT/NAME or nbd://[::1]/NAME        loopback addresses only
//	nbd+unix:///NAME?socket=PATH
//	nbds://HOST:PORT/NAME?tls-certificates=DIR           any address of this machine
//	nbds+unix:///NAME?socket=PATH&tls-certificates=DIR
//
// Without TLS nothing is encrypted and nobody is asked who he is, so other
// addresses than loopback are refused. DIR is as LoadTLS reads it. A unix socket gets mode 0600 and goes
// with the listener; one that nobody answers on is replaced.
func Listen(uri string) (*Listener, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	l := &Listener{Export: strings.TrimPrefix(u.Path, "/")}
	scheme, unix := strings.CutSuffix(u.Scheme, "+unix")
	if scheme != "nbd" && scheme != "nbds" {
		return nil, fmt.Errorf("%q: %w: %s", uri, ErrURI, forms)
	}
	for key := range u.Query() {
		if !slices.Contains([]string{"socket", "tls-certificates"}, key) {
			return nil, fmt.Errorf("%q: %w: %q means nothing here; %s", uri, ErrURI, key, forms)
		}
	}
	dir, secure := u.Query().Get("tls-certificates"), scheme == "nbds"
	if secure != (dir != "") {
		return nil, fmt.Errorf("%q: %w: TLS takes both, nbds and tls-certificates=DIR; %s", uri, ErrURI, forms)
	}
	if secure {
		if l.TLS, err = LoadTLS(dir); err != nil {
			return nil, err
		}
	}
	if unix {
		l.Listener, err = listenUnix(u)
	} else {
		l.Listener, err = listenTCP(u, secure)
	}
	if err != nil {
		return nil, err
	}
	if !unix {
		u.Host = l.Addr().String()
	}
	l.URI = u.String()
	return l, nil
}

func listenTCP(u *url.URL, secure bool) (net.Listener, error) {
	if u.Query().Has("socket") {
		return nil, fmt.Errorf("%q: %w: a socket's path goes with nbd+unix or nbds+unix; %s", u, ErrURI, forms)
	}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	host := u.Hostname()
	ip := net.ParseIP(host)
	if !secure && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("%q: %w: without TLS only loopback addresses and unix sockets are served; use nbds:// with certificates, or reach it from elsewhere through ssh -L", u, ErrURI)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, fmt.Errorf("%q: %w: port %s: want 0 (any that is free) to 65535", u, ErrURI, port)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if errors.Is(err, syscall.EADDRINUSE) {
		err = fmt.Errorf("%w: %w", ErrSocketInUse, err)
	}
	return l, err
}

func listenUnix(u *url.URL) (net.Listener, error) {
	path := u.Query().Get("socket")
	if path == "" || u.Host != "" {
		return nil, fmt.Errorf("%q: %w: %s", u, ErrURI, forms)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("%s is there and is no socket: %w", path, ErrSocketInUse)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("%s: %w", path, ErrSocketInUse)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	if len(path) > socketPathMax {
		return nil, fmt.Errorf("%q: %w: the socket's path has %d bytes, and the kernel takes %d", u, ErrURI, len(path), socketPathMax)
	}
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	return net.Listen("unix", path)
}
