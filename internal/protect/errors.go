package protect

import "errors"

// Errors that callers branch on; each is wrapped with what it is about.
var (
	ErrNoGroup        = errors.New("no such group")
	ErrExists         = errors.New("a group of this name exists")
	ErrSettings       = errors.New("not a valid setting")
	ErrRefused        = errors.New("this disk cannot be protected as it is")
	ErrInsideGap      = errors.New("inside a gap: there is no consistent point until it is filled")
	ErrBookmarkExists = errors.New("the name is taken in this group's history")
	ErrOffline        = errors.New("the group is offline")
	ErrNoHooks        = errors.New("application consistency needs hooks")
	ErrNotFrozen      = errors.New("there is nothing that could be frozen")
	ErrInUse          = errors.New("in use")
	ErrOtherDisks     = errors.New("the vault holds a history of other disks under this name")
	ErrNoMark         = errors.New("no such prepared mark")
	ErrNotPrepared    = errors.New("it is not prepared, or is decided already")
	ErrRevoked        = errors.New("it was revoked")
	ErrCommitted      = errors.New("it is committed already")
	ErrGroupWentAway  = errors.New("the group was opened anew meanwhile")
	ErrStoodTooLong   = errors.New("no instant was chosen in time")
	ErrUndelivered    = errors.New("not every group has it yet")
	ErrBarrier        = errors.New("this barrier cannot be had")
)
