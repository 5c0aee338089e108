package api

import (
	"context"
	"net/http"

	"tidemark/internal/health"
)

// Device is one served device.
type Device struct {
	Name       string             `json:"name"`
	Node       string             `json:"node"`   // what users open: a block device, or an NBD URI; "" where it is offline
	Kernel     string             `json:"kernel"` // the kernel's own name of the block device; "" for nbd-server
	Front      string             `json:"front"`
	Backing    string             `json:"backing"`
	SizeBytes  int64              `json:"size_bytes"`
	ReadOnly   bool               `json:"read_only"`
	Open       bool               `json:"open"` // somebody has it open
	Filters    []Filter           `json:"filters"`
	Conditions []health.Condition `json:"conditions"`
}

// Filter is one filter of a device's stack, highest altitude first.
type Filter struct {
	Name     string `json:"name"`
	Altitude int    `json:"altitude"`
}

// DeviceRequest is the body of POST /v1/devices. Front "" is "auto".
type DeviceRequest struct {
	Name     string `json:"name"`
	Backing  string `json:"backing"` // absolute path
	Front    string `json:"front,omitempty"`
	Listen   string `json:"listen,omitempty"` // NBD URI, for the front nbd-server
	ReadOnly bool   `json:"read_only,omitempty"`
	// NoZeroCopy has the front ublk copy data also where the kernel can do without.
	NoZeroCopy bool `json:"no_zero_copy,omitempty"`
}

// ResizeRequest is the body of POST /v1/devices/{name}/resize. 0 takes the
// size that the backing has; more makes a backing file as large first.
type ResizeRequest struct {
	SizeBytes int64 `json:"size_bytes,omitempty"`
}

// FilterRequest is the body of POST /v1/devices/{name}/filters: one of Attach and Detach.
type FilterRequest struct {
	Attach       string     `json:"attach,omitempty"` // barrier, cow, track or capture where it was lost; delay or error
	Detach       string     `json:"detach,omitempty"`
	DelaySeconds float64    `json:"delay_seconds,omitempty"` // of delay
	Range        *ByteRange `json:"range,omitempty"`         // of error; none: every request
	Force        bool       `json:"force,omitempty"`         // though it spoils something
}

// SpliceRequest is the body of POST /v1/splices.
type SpliceRequest struct {
	Device string `json:"device"`          // absolute path of a device-mapper device
	Name   string `json:"name,omitempty"`  // of the served device; "": the volume's own
	Front  string `json:"front,omitempty"` // ublk, nbd or auto
	// GiveBackSeconds is how long the volume waits for a daemon until it gets
	// its own table back; 0: for ever; nil: a minute.
	GiveBackSeconds *float64 `json:"give_back_seconds,omitempty"`
}

// Devices is the part of the Service that is about served devices.
type Devices interface {
	Devices(ctx context.Context) ([]Device, error)
	CreateDevice(ctx context.Context, r DeviceRequest) (Device, error)
	RemoveDevice(ctx context.Context, name string) error
	ResizeDevice(ctx context.Context, name string, r ResizeRequest) (Device, error)
	ChangeFilters(ctx context.Context, name string, r FilterRequest) (Device, error)
	Splice(ctx context.Context, r SpliceRequest) (Device, error)
	Unsplice(ctx context.Context, name string) error
}

var deviceRoutes = []route{
	{"GET", "/v1/devices", func(s Service, r *http.Request) (any, error) { return s.Devices(r.Context()) }},
	{"POST", "/v1/devices", func(s Service, r *http.Request) (any, error) {
		var req DeviceRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.CreateDevice(r.Context(), req)
	}},
	{"DELETE", "/v1/devices/{name}", func(s Service, r *http.Request) (any, error) {
		return struct{}{}, s.RemoveDevice(r.Context(), r.PathValue("name"))
	}},
	{"POST", "/v1/devices/{name}/resize", func(s Service, r *http.Request) (any, error) {
		var req ResizeRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.ResizeDevice(r.Context(), r.PathValue("name"), req)
	}},
	{"POST", "/v1/devices/{name}/filters", func(s Service, r *http.Request) (any, error) {
		var req FilterRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.ChangeFilters(r.Context(), r.PathValue("name"), req)
	}},
	{"POST", "/v1/splices", func(s Service, r *http.Request) (any, error) {
		var req SpliceRequest
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
		return s.Splice(r.Context(), req)
	}},
	{"DELETE", "/v1/splices/{name}", func(s Service, r *http.Request) (any, error) {
		return struct{}{}, s.Unsplice(r.Context(), r.PathValue("name"))
	}},
}

// Devices and the rest call the Service's methods of the same names.
func (c *Client) Devices(ctx context.Context) ([]Device, error) {
	return call[[]Device](ctx, c, "GET", "/v1/devices", nil)
}

func (c *Client) CreateDevice(ctx context.Context, r DeviceRequest) (Device, error) {
	return call[Device](ctx, c, "POST", "/v1/devices", r)
}

func (c *Client) RemoveDevice(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, "DELETE", "/v1/devices/"+segment(name), nil)
	return err
}

func (c *Client) ResizeDevice(ctx context.Context, name string, r ResizeRequest) (Device, error) {
	return call[Device](ctx, c, "POST", "/v1/devices/"+segment(name)+"/resize", r)
}

func (c *Client) ChangeFilters(ctx context.Context, name string, r FilterRequest) (Device, error) {
	return call[Device](ctx, c, "POST", "/v1/devices/"+segment(name)+"/filters", r)
}

func (c *Client) Splice(ctx context.Context, r SpliceRequest) (Device, error) {
	return call[Device](ctx, c, "POST", "/v1/splices", r)
}

func (c *Client) Unsplice(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, "DELETE", "/v1/splices/"+segment(name), nil)
	return err
}
