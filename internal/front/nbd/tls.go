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
	"slices"
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

// TLS is the server's side of TLS by a folder of certificates: its own certificate
// and key, the CA that a client's certificate must be signed by, and the list of
// those that the CA has revoked. Every client must have a certificate. The
// folder is read again for each client, so that renewed certificates need no restart.
type TLS struct{ dir string }

// LoadTLS checks the folder. ErrCertificates says what is missing in it.
func LoadTLS(dir string) (*TLS, error) {
	t := &TLS{dir}
	_, err := t.read()
	return t, err
}

// identity is what the folder holds.
type identity struct {
	cert    tls.Certificate
	clients *x509.CertPool
	revoked map[string]bool // by serial number
}

func (t *TLS) read() (*identity, error) {
	dir := t.dir
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
	return &identity{cert: cert, clients: pool, revoked: revoked}, nil
}

// config asks clients for a certificate. It is looked at after the handshake, by
// admit: a refusal can then be said in words, where TLS has only an alert.
func (i *identity) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{i.cert}, ClientAuth: tls.RequestClientCert, ClientCAs: i.clients,
		SessionTicketsDisabled: true, // one that was given out would outlive a revocation
	}
}

// admit says whether a client that has proven to have the key of the first
// certificate is to be served.
func (i *identity) admit(certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return fmt.Errorf("no client certificate that the CA in the server's %s has signed", caFile)
	}
	between := x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{Roots: i.clients, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return fmt.Errorf("the client's certificate (%s): %w", certs[0].Subject, err)
	}
	for _, c := range slices.Concat(chains...) {
		if i.revoked[c.SerialNumber.String()] {
			return fmt.Errorf("the client's certificate (%s) is revoked", c.Subject)
		}
	}
	return nil
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
