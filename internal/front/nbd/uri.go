package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"
)

// ErrURI: not a place where this server listens.
var ErrURI = errors.New("not an NBD URI to serve at")

// ErrSocketInUse: another server answers there.
var ErrSocketInUse = errors.New("the socket is in use")

const defaultPort = "10809"

// Listen listens where an NBD URI says, and gives the export's name in it:
// nbd://127.0.0.1:PORT/NAME, nbd://[::1]/NAME or nbd+unix:///NAME?socket=PATH.
// Other addresses are refused: what is served is not encrypted, and asks nobody
// who he is. A unix socket gets mode 0600 and goes with the listener; one that
// nobody answers on is replaced.
func Listen(uri string) (l net.Listener, name string, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrURI, err)
	}
	name = strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "nbd":
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		host := u.Hostname()
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, "", fmt.Errorf("%q: %w: only loopback addresses and unix sockets are served; reach it from elsewhere through ssh -L", uri, ErrURI)
		}
		l, err = net.Listen("tcp", net.JoinHostPort(host, port))
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w: %w", ErrSocketInUse, err)
		}
		return l, name, err
	case "nbd+unix":
		path := u.Query().Get("socket")
		if path == "" || u.Host != "" {
			return nil, "", fmt.Errorf("%q: %w: want nbd+unix:///NAME?socket=PATH", uri, ErrURI)
		}
		l, err = listenUnix(path)
		return l, name, err
	}
	return nil, "", fmt.Errorf("%q: %w: want nbd://127.0.0.1:PORT/NAME or nbd+unix:///NAME?socket=PATH", uri, ErrURI)
}

func listenUnix(path string) (net.Listener, error) {
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
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	return net.Listen("unix", path)
}
