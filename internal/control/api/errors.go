package api

import (
	"errors"
	"net/http"
)

// Code tells a client's program what kind of failure it met. Codes are stable;
// docs/operating.md gives the command line's exit code for each.
type Code string

const (
	CodeInternal    Code = "internal"
	CodeUsage       Code = "usage"
	CodeNoDaemon    Code = "no-daemon"
	CodeNotFound    Code = "not-found"
	CodeRefused     Code = "refused"
	CodeNotAVault   Code = "not-a-vault"
	CodeDamaged     Code = "damaged"
	CodeInsideGap   Code = "inside-gap"
	CodeInUse       Code = "in-use"
	CodeUnreachable Code = "unreachable"
	CodeFullCopy    Code = "full-copy" // what changed since then is not known: copy everything
	CodeNothing     Code = "nothing"   // nothing is pending for the consumer, or not enough in time
	CodeNotGiven    Code = "not-given" // not a batch that can be committed, or gone on from
)

// Error is a failure with its code and, where there is one, what to do about it.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
	err     error
}

// Error gives the message and the remedy.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + "\n  " + e.Remedy
}

func (e *Error) Unwrap() error { return e.err }

// Wrap gives err a code and a remedy; err's own text is the message.
func Wrap(code Code, err error, remedy string) *Error {
	return &Error{Code: code, Message: err.Error(), Remedy: remedy, err: err}
}

// CodeOf is the code of the first *Error in err's chain, CodeInternal where there is none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

var httpStatus = map[Code]int{
	CodeInternal:    http.StatusInternalServerError,
	CodeUsage:       http.StatusBadRequest,
	CodeNotFound:    http.StatusNotFound,
	CodeRefused:     http.StatusForbidden,
	CodeNotAVault:   http.StatusUnprocessableEntity,
	CodeDamaged:     http.StatusUnprocessableEntity,
	CodeInsideGap:   http.StatusConflict,
	CodeInUse:       http.StatusConflict,
	CodeUnreachable: http.StatusServiceUnavailable,
	CodeFullCopy:    http.StatusGone,
	CodeNothing:     http.StatusTooEarly,
	CodeNotGiven:    http.StatusConflict,
}
