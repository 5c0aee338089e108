/* The control interface of the disk filter driver "involflt" on Linux, 64 bits:
 * numbers and structures, declared anew. Names are those that its documentation
 * uses. Fields that are of no use here are part of a reserve. */
#ifndef INVOLFLT_H
#define INVOLFLT_H
#include <linux/types.h>
#include <sys/ioctl.h>

#define FLT_IOCTL 0xfe
#define GUID_LEN 36

typedef struct { char guid[128]; } VOLUME_GUID;

/* what the number of START_FILTERING_DEVICE_V2 is made of, and what it takes */
typedef struct {
	__u32 d_type;
	char d_guid[256];
	char d_mnt_pt[4096];
	__u64 d_nblks;
	__u32 d_bsize;
	__u64 d_flags;
} inm_dev_info_compat_t;

typedef struct {
	__u32 d_type;
	char d_guid[256];
	char d_mnt_pt[4096];
	__u64 d_nblks;
	__u32 d_bsize;
	__u64 d_flags;
	char d_pname[256];
} inm_dev_info_t;

typedef struct { __u32 ulFlags; } PROCESS_START_NOTIFY_INPUT, SHUTDOWN_NOTIFY_INPUT;

typedef struct { __u16 usStreamRecType; __u8 ucFlags; __u8 ucLength; } STREAM_REC_HDR_4B;
typedef struct { STREAM_REC_HDR_4B Header, Reserved; __u64 ullSequenceNumber, TimeInHundNanoSeconds; } TIME_STAMP_TAG_V2;
typedef struct { STREAM_REC_HDR_4B Header; __u32 ulDataSource; } DATA_SOURCE_TAG;

#define MAX_DIRTY_CHANGES_V2 204
typedef struct {
	union {
		struct {
			__u64 uliTransactionID, ulicbChanges;
			__u32 cChanges, ulTotalChangesPending;
			__u64 ulicbTotalChangesPending;
			__u32 ulFlags, ulSequenceIDforSplitIO, ulBufferSize;
			__u16 usMaxNumberOfBuffers, usNumberOfBuffers;
			__u32 ulcbChangesInStream;
			void **ppBufferArray;
			__u32 ulcbBufferArraySize;
			unsigned long ulOutOfSyncCount;
			__u8 ErrorStringForResync[128];
			unsigned long ulOutOfSyncErrorCode;
			__u64 liOutOfSyncTimeStamp, ullPrevEndSequenceNumber, ullPrevEndTimeStamp;
			__u32 ulPrevSequenceIDforSplitIO, eWOState;
		} Hdr;
		__u8 reserve[512];
	} uHdr;
	union {
		struct {
			STREAM_REC_HDR_4B TagStartOfList, TagPadding;
			TIME_STAMP_TAG_V2 TagTimeStampOfFirstChange, TagTimeStampOfLastChange;
			DATA_SOURCE_TAG TagDataSource;
			STREAM_REC_HDR_4B TagEndOfList;
		} TagList;
		struct {
			__u16 usLength;
			char FileName[1791];
		} DataFile;
		__u8 reserve[3584];
	} uTagList;
	__u64 ChangeOffsetArray[MAX_DIRTY_CHANGES_V2];
	__u32 ChangeLengthArray[MAX_DIRTY_CHANGES_V2];
	__u32 TimeDeltaArray[MAX_DIRTY_CHANGES_V2];
	__u32 SequenceNumberDeltaArray[MAX_DIRTY_CHANGES_V2];
} UDIRTY_BLOCK_V2;

#define UDIRTY_BLOCK_FLAG_START_OF_SPLIT_CHANGE 0x00000001
#define UDIRTY_BLOCK_FLAG_PART_OF_SPLIT_CHANGE 0x00000002
#define UDIRTY_BLOCK_FLAG_END_OF_SPLIT_CHANGE 0x00000004
#define UDIRTY_BLOCK_FLAG_DATA_FILE 0x00000008
#define UDIRTY_BLOCK_FLAG_SVD_STREAM 0x00000010
#define UDIRTY_BLOCK_FLAG_TSO_FILE 0x00000020
#define UDIRTY_BLOCK_FLAG_VOLUME_RESYNC_REQUIRED 0x80000000

typedef struct { char VolumeGUID[128]; __u64 ulTransactionID; __u32 ulFlags; } COMMIT_TRANSACTION;
typedef struct { char VolumeGUID[128]; __s32 Seconds; } WAIT_FOR_DB_NOTIFY;
typedef struct { char VolumeGUID[128]; __u32 threshold; } get_db_thres_t;

typedef struct { __s32 flags, status; char vol_name[256]; } volume_info_t;
typedef struct { __s32 nr_vols, timeout; volume_info_t *vol_info; char tag_guid[GUID_LEN]; } freeze_info_t;
typedef struct { __s32 nr_vols; volume_info_t *vol_info; char tag_guid[GUID_LEN]; } thaw_info_t;
typedef struct { __u16 tag_len; char tag_name[256]; } tag_names_t;
typedef struct {
	__s32 flags, nr_vols, nr_tags, timeout;
	char tag_guid[GUID_LEN];
	volume_info_t *vol_info;
	tag_names_t *tag_names;
} tag_info_t_v2;
typedef struct { char fbc_guid[GUID_LEN]; __s32 fbc_timeout_ms, fbc_flags; } flt_barrier_create_t;
typedef struct { char fbr_guid[GUID_LEN]; __s32 fbr_flags; } flt_barrier_remove_t;
typedef struct { char ftc_guid[GUID_LEN]; __u32 ftc_flags; } flt_tag_commit_t;

typedef struct { VOLUME_GUID guid; char *bufp; __u32 buf_len; } VOLUME_STATS;
typedef struct { char *bufp; __u32 buf_len; } GET_VOLUME_LIST;
typedef struct { VOLUME_GUID VolumeGuid; __u64 ullTotalChangesPending, ullOldestChangeTimeStamp, ullDriverCurrentTimeStamp; } VOLUME_STATS_ADDITIONAL_INFO;
typedef struct { char VolumeGUID[128]; __u64 TimeInHundNanoSeconds, ullSequenceNumber; } RESYNC_START_V2;
typedef struct { __u16 driver[4], product[4]; } DRIVER_VERSION;

#define IOCTL_INMAGE_STOP_FILTERING_DEVICE _IOW(FLT_IOCTL, 0, VOLUME_GUID)
#define IOCTL_INMAGE_PROCESS_START_NOTIFY _IOW(FLT_IOCTL, 2, PROCESS_START_NOTIFY_INPUT)
#define IOCTL_INMAGE_SERVICE_SHUTDOWN_NOTIFY _IOW(FLT_IOCTL, 3, SHUTDOWN_NOTIFY_INPUT)
#define IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS _IOWR(FLT_IOCTL, 4, VOLUME_GUID)
#define IOCTL_INMAGE_COMMIT_DIRTY_BLOCKS_TRANS _IOW(FLT_IOCTL, 5, COMMIT_TRANSACTION)
#define IOCTL_INMAGE_WAIT_FOR_DB _IOW(FLT_IOCTL, 8, WAIT_FOR_DB_NOTIFY)
#define IOCTL_INMAGE_CLEAR_DIFFERENTIALS _IOW(FLT_IOCTL, 9, VOLUME_GUID)
#define IOCTL_INMAGE_UNSTACK_ALL _IO(FLT_IOCTL, 11)
#define IOCTL_INMAGE_WAKEUP_ALL_THREADS _IO(FLT_IOCTL, 14)
#define IOCTL_INMAGE_GET_DB_NOTIFY_THRESHOLD _IOWR(FLT_IOCTL, 15, get_db_thres_t)
#define IOCTL_INMAGE_RESYNC_START_NOTIFICATION _IOWR(FLT_IOCTL, 17, RESYNC_START_V2)
#define IOCTL_INMAGE_RESYNC_END_NOTIFICATION _IOWR(FLT_IOCTL, 18, RESYNC_START_V2)
#define IOCTL_INMAGE_GET_DRIVER_VERSION _IOWR(FLT_IOCTL, 19, DRIVER_VERSION)
#define IOCTL_INMAGE_GET_GLOBAL_STATS _IO(FLT_IOCTL, 25)
#define IOCTL_INMAGE_GET_VOLUME_STATS _IO(FLT_IOCTL, 26)
#define IOCTL_INMAGE_GET_PROTECTED_VOLUME_LIST _IO(FLT_IOCTL, 27)
#define IOCTL_INMAGE_START_FILTERING_DEVICE_V2 _IOW(FLT_IOCTL, 31, inm_dev_info_compat_t)
#define IOCTL_INMAGE_GET_ADDITIONAL_VOLUME_STATS _IOWR(FLT_IOCTL, 43, VOLUME_STATS_ADDITIONAL_INFO)
#define IOCTL_INMAGE_FREEZE_VOLUME _IOW(FLT_IOCTL, 49, freeze_info_t)
#define IOCTL_INMAGE_TAG_VOLUME_V2 _IOWR(FLT_IOCTL, 50, tag_info_t_v2)
#define IOCTL_INMAGE_THAW_VOLUME _IOW(FLT_IOCTL, 51, thaw_info_t)
#define IOCTL_INMAGE_IOBARRIER_TAG_VOLUME _IOWR(FLT_IOCTL, 52, tag_info_t_v2)
#define IOCTL_INMAGE_CREATE_BARRIER_ALL _IOWR(FLT_IOCTL, 53, flt_barrier_create_t)
#define IOCTL_INMAGE_REMOVE_BARRIER_ALL _IOWR(FLT_IOCTL, 54, flt_barrier_remove_t)
#define IOCTL_INMAGE_TAG_COMMIT_V2 _IOWR(FLT_IOCTL, 55, flt_tag_commit_t)
#define IOCTL_INMAGE_WAIT_FOR_DB_V2 _IOW(FLT_IOCTL, 66, WAIT_FOR_DB_NOTIFY)
#define IOCTL_INMAGE_GET_DIRTY_BLOCKS_TRANS_V2 _IOWR(FLT_IOCTL, 72, UDIRTY_BLOCK_V2)

#endif
