package nbd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The files of a certificate folder, as qemu and libnbd name them.
const (
	caFile   = "ca-cert.pem"
	crlFile  = "ca-crl.pem" // may be absent
	certFile = "server-cert.pem"
	keyFile  = "server-key.pem"
)

// ErrCertificates: the folder does not hold what TLS needs.
var ErrCertificates = errors.New("no certificates to serve TLS with")

// LoadTLS makes the server's side of TLS from a folder: its own certificate and
// key, the CA that a client's certificate must be signed by, and the list of those that the
// CA has revoked. Every client must have a certificate. The folder
// is read again for each client, so that renewed certificates need no restart.
func LoadTLS(dir string) (*tls.Config, error) {
	if _, err := readTLS(dir); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return readTLS(dir) },
	}, nil
}

func readTLS(dir string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, certFile), filepath.Join(dir, keyFile))
	if err != nil {
		return nil, fmt.Errorf("%w in %s: %s and %s: %w", ErrCertificates, dir, certFile, keyFile, err)
	}
	ca, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		return nil, fmt.Errorf("%w: the CA that clients' certificates are signed by: %w", ErrCertificates, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%w: no certificate in %s", ErrCertificates, filepath.Join(dir, caFile))
	}
	revoked, err := readRevoked(filepath.Join(dir, crlFile), ca)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCertificates, err)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		SessionTicketsDisabled: true, // one that was given out would outlive a revocation
		VerifyConnection: func(s tls.ConnectionState) error {
			for _, c := range s.PeerCertificates {
				if revoked[c.SerialNumber.String()] {
					return fmt.Errorf("the certificate of %s is revoked", c.Subject)
				}
			}
			return nil
		},
	}, nil
}

// readRevoked gives the serial numbers that the CA has revoked; none where there is no list.
func readRevoked(path string, ca []byte) (map[string]bool, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if p, _ := pem.Decode(raw); p != nil {
		raw = p.Bytes
	}
	list, err := x509.ParseRevocationList(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := signedByOne(list, ca); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	serials := map[string]bool{}
	for _, e := range list.RevokedCertificateEntries {
		serials[e.SerialNumber.String()] = true
	}
	return serials, nil
}

// signedByOne checks a list against the CAs of a PEM file.
func signedByOne(list *x509.RevocationList, ca []byte) error {
	err := errors.New("no CA")
	for rest := bytes.TrimSpace(ca); len(rest) > 0; {
		var p *pem.Block
		if p, rest = pem.Decode(rest); p == nil {
			break
		}
		var c *x509.Certificate
		if c, err = x509.ParseCertificate(p.Bytes); err == nil {
			if err = list.CheckSignatureFrom(c); err == nil {
				return nil
			}
		}
	}
	return fmt.Errorf("not signed by the CA: %w", err)
}
